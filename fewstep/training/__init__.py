"""The training loop, and what it needs: gradients, optimisers, averages, precision, processes."""
