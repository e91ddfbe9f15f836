"""Teachers from diffusers pipelines: folders read as data, networks wrapped as denoisers.

Nothing else in the package imports diffusers or transformers; both are in the extra `t2i`.
"""
