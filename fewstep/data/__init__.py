"""Where batches come from: pure functions of the draws, hence resumable anywhere."""
