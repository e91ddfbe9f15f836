"""Pure losses: tensors in, (B,) tensors out; no networks, no randomness.

One reduction for all: the mean over a sample's own dimensions here, the mean over the batch in
the method. Published sums and scales are converted in the recipes.
"""
