"""What a run would cost, found by its own training loop on tensors without numbers."""
