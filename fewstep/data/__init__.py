"""Sources of batches: pure functions of random draws, so that any step can be resumed."""
