"""fewstep train: a teacher by a recipe."""

from __future__ import annotations

from fewstep.cli.recipe_run import run_recipe


def run(args: list[str]) -> int:
    """Train a teacher by a recipe."""
    return run_recipe("train", args)
