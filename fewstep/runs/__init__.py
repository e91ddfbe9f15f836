"""A run in its folder: configuration, execution, monitoring, and reading it again."""
