"""fewstep distill: a teacher to a few steps by a recipe."""

from __future__ import annotations

from functools import partial

from fewstep.cli.recipe_verbs import run_recipe

run = partial(run_recipe, "distill")
"""Distil a teacher by a recipe."""
