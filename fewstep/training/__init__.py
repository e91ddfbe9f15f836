"""The training loop, gradients, optimisers, moving averages, precision and several processes."""
