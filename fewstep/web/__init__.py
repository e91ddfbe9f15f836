"""Pages served on this machine: the playground of a student."""
