"""Pipelines of diffusers, at the edge: folders read safely, networks wrapped once as denoisers.

Nothing else in the package imports diffusers or transformers; both are in the extra `t2i`.
"""
