"""Atomic files with digests, checkpoints and model folders."""
