"""Noise paths, time distributions, denoisers, samplers, guidance and random numbers."""
