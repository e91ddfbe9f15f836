"""Finished students as files that other programs load."""
