"""Configuration as text: frozen dataclasses to JSON, to expressions, and back.

    encode(SiD(alpha=1.0))      -> {"type": "SiD", "alpha": 1.0, "sampler": {"type": ...}, ...}
    parse("SiD(alpha=1.0)")     -> SiD(alpha=1.0)

Text never runs: an expression is parsed to names and literals, a name is looked up among the
configuration classes of the package, every value is checked against its field's type.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import math
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGES = ("methods", "nets", "recipes")
MODULES = (
    *("path", "times", "sample", "guidance", "augment", "fake_score", "critic"),
    *("optim", "ema", "ema_power", "model", "lora", "rules"),
    *("losses.distance", "losses.weight", "teachers.published"),
    *("pipelines.net", "pipelines.schedule"),
)


_loaded: dict[str, str] = {}
"""Module name -> SHA-256 of the user's own file it was made from."""


@lru_cache(maxsize=1)
def known() -> dict[str, type]:
    """Every configuration class of the package, by name."""
    names = [f"fewstep.{name}" for name in MODULES]
    for package in PACKAGES:
        found = importlib.import_module(f"fewstep.{package}")
        names += [f"fewstep.{package}.{m.name}" for m in pkgutil.iter_modules(found.__path__)]
    classes: dict[str, type] = {}
    for name in names:
        classes |= _classes(importlib.import_module(name))
    return classes


def _classes(module: types.ModuleType) -> dict[str, type]:
    """The dataclasses defined in a module."""
    return {
        value.__name__: value
        for value in vars(module).values()
        if isinstance(value, type) and is_dataclass(value) and value.__module__ == module.__name__
    }


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """ "; did you mean 'x'?" or "; choose from a, b, c"."""
    lower = {known.lower(): known for known in sorted(names)}
    if close := difflib.get_close_matches(name.lower(), lower, 1):
        return f"; did you mean {lower[close[0]]!r}?"
    return f"; choose from {', '.join(lower.values())}" if lower else ""


def encode(value: Any) -> Any:
    """A tree of dataclasses as JSON values; a dataclass becomes {"type": name, **fields}."""
    if is_dataclass(value) and not isinstance(value, type):
        pairs = {f.name: encode(getattr(value, f.name)) for f in fields(value)}
        return {"type": type(value).__name__, **pairs}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("nan is no setting; give a number")
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot store a {type(value).__name__} as configuration: {value!r}")


def own_files(value: Any) -> dict[str, str]:
    """Class name -> SHA-256 of its file, for the parts of `value` that are the user's own."""
    if not is_dataclass(value) or isinstance(value, type):
        return {}
    cls = type(value)
    found = {cls.__name__: _loaded[cls.__module__]} if cls.__module__ in _loaded else {}
    for field in fields(value):
        found |= own_files(getattr(value, field.name))
    return found


def decode(data: Any, expected: type = object) -> Any:
    """The dataclass described by `encode`'s output, checked field by field."""
    if not isinstance(data, Mapping) or not isinstance(data.get("type"), str):
        raise ValueError(f"expected an expression such as Name(field=value), got {data!r}")
    name = data["type"]
    if name not in known():
        fitting = [key for key, cls in known().items() if issubclass(cls, expected)]
        raise ValueError(f"there is no {name!r}{nearest(name, fitting)}")
    return build(known()[name], {k: v for k, v in data.items() if k != "type"}, expected)


def build(cls: type, values: Mapping[str, Any], expected: type = object) -> Any:
    """cls(**values) with every value checked against the field's annotation."""
    names = _fields(cls)
    if not issubclass(cls, expected):
        kind = getattr(expected, "__name__", str(expected))
        raise ValueError(f"expected a {kind}, got {cls.__name__}")
    hints = typing.get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{cls.__name__} has no field {name!r}{nearest(name, names)}")
        checked[name] = conform(value, hints[name], f"{cls.__name__}.{name}")
    try:
        return cls(**checked)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None


def _fields(cls: Any) -> list[str]:
    """What a configuration class is made of, in order; class variables are not fields."""
    return [f.name for f in fields(cls)]


def conform(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; a ValueError says what `where` is and what came."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union or origin is types.UnionType:
        for option in args:
            try:
                return conform(value, option, where)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
        hint = " | ".join(map(repr, args))
    elif origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(conform(item, args[0], where) for item in value)
        if len(args) == len(value):
            return tuple(conform(v, a, where) for v, a in zip(value, args, strict=True))
    elif origin is not None and isinstance(value, Mapping):
        return {key: conform(item, args[1], f"{where}[{key!r}]") for key, item in value.items()}
    elif isinstance(hint, type):
        if is_dataclass(value) and isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return decode(value, hint)
        if hint is float and type(value) in (int, float):
            return float(value)
        if hint is float and value in ("inf", "-inf"):
            return float(value)
        if type(value) is hint:
            return value
    name = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ValueError(f"{where} is {name}, got {value!r}")


def parse(text: str, expected: type = object) -> Any:
    """The dataclass written as an expression: "Karras(tmax=800)", or "Karras" for its defaults."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return decode(_tree(tree), expected)
    except (SyntaxError, RecursionError, MemoryError):
        shown = _short(text)
        raise ValueError(f"cannot read {shown}; write it as Name(field=value, ...)") from None


def _tree(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id not in ("inf", "nan"):
        return {"type": node.id}
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        if name not in known():
            return {"type": name}  # `decode` knows what would fit
        order = [f.name for f in fields(known()[name]) if not f.kw_only]
        if len(node.args) > len(order):
            more = f"got {len(node.args)}; write the others as field=value"
            raise ValueError(f"{name} takes {len(order)} values without a name, {more}")
        keywords = [word.arg or "**" for word in node.keywords]
        for twice in set(keywords) & set(order[: len(node.args)]):
            raise ValueError(f"{name}.{twice} is given twice")
        values = map(_tree, [*node.args, *(word.value for word in node.keywords)])
        names = [*order[: len(node.args)], *keywords]
        return {"type": name, **dict(zip(names, values, strict=True))}
    if isinstance(node, (ast.Tuple, ast.List)):
        return [_tree(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"cannot read {_short(ast.unparse(node))} as a value") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def configuration(text: str, expected: type = object) -> Any:
    """The configuration written as "Name(field=value)" or "file.py:Name(field=value)"."""
    match = re.fullmatch(r"([^'\"]+?\.py):(\w+.*)", text, re.DOTALL)
    if match:
        load_classes(Path(match[1]))
        text = match[2]
    return parse(text, expected)


def load_classes(path: Path) -> types.ModuleType:
    """Import the user's own file and make the configuration classes in it known by name."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    name = f"file_{path.stem}"  # no name of an installed module
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # where dataclasses look for their annotations
    try:
        found.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}") from None
    known().update(_classes(module))
    _loaded[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return module
