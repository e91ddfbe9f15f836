"""Recipes: Python functions that return a complete, typed `Run`; one per set-up."""
