"""fewstep distill: a teacher to a few steps by a recipe."""

from __future__ import annotations

from fewstep.cli.recipe_run import run_recipe


def run(args: list[str]) -> int:
    """Distil a teacher by a recipe."""
    return run_recipe("distill", args)
