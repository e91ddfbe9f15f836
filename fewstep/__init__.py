"""fewstep: distil a diffusion or flow model into a generator of one to eight network calls.

The public names stand once, in `__init__.pyi`, with the module that each is from. They load on
first use, so that `import fewstep` costs nothing.
"""

from __future__ import annotations

import ast
import importlib
from functools import lru_cache
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


@lru_cache(maxsize=1)
def _homes() -> dict[str, str]:
    """Public name -> the module that defines it."""
    tree = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    return {
        alias.name: str(node.module)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_homes())
    if name not in _homes():
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(importlib.import_module(_homes()[name]), name)


def __dir__() -> list[str]:
    return [*sorted(_homes()), "__version__"]
