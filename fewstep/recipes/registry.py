"""Finding recipes by name: every public function of this package that returns a `Run`.

A module of many recipes has them in a table, `RECIPES`, by name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path

from fewstep import recipes
from fewstep.config import nearest
from fewstep.runs.run import Run

Recipe = Callable[[], Run]


def in_module(module: object) -> dict[str, Recipe]:
    """The recipes defined in a module, and those of its table `RECIPES`."""
    name = getattr(module, "__name__", "")
    table: dict[str, Recipe] = getattr(module, "RECIPES", {})
    return table | {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == name
        and not key.startswith("_")
        and value.__annotations__.get("return") in (Run, "Run")
    }


def by_module() -> dict[str, dict[str, Recipe]]:
    """Recipes of this package by name, grouped under the first line of their module."""
    groups = {}
    for name in (m.name for m in pkgutil.iter_modules(recipes.__path__)):
        if name not in ("registry", "choosing"):
            module = importlib.import_module(f"fewstep.recipes.{name}")
            groups[(module.__doc__ or name).partition("\n")[0]] = in_module(module)
    return groups


def every() -> dict[str, Recipe]:
    """The recipes of this package, by name."""
    return {name: make for group in by_module().values() for name, make in group.items()}


def recipe(name: str) -> Recipe:
    """The recipe called `name`, or the function `name` of the user's own file ("file.py:name")."""
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        from fewstep.config import load_classes

        known = in_module(load_classes(Path(path)))
        name = function
    else:
        known = every()
    if name not in known:
        raise ValueError(f"there is no recipe {name!r}{nearest(name, known)}")
    return known[name]


def summary(make: Recipe) -> str:
    """The first line of the docstring of a recipe."""
    return (inspect.getdoc(make) or "").partition("\n")[0]
