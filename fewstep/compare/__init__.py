"""Several runs side by side: one table, one page."""
