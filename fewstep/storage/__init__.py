"""Files that survive: atomic writes, digests, checkpoints, model folders."""
