"""Configuration as text: frozen dataclasses to JSON, to expressions, and back.

    encode(SiD(alpha=1.0))      -> {"type": "SiD", "alpha": 1.0, "sampler": {"type": ...}, ...}
    parse("SiD(alpha=1.0)")     -> SiD(alpha=1.0)

Text never runs: an expression is parsed to names and literals, a name is looked up among the
configuration classes of the package, every value is checked against its field's type. Those are
the dataclasses that a `Run` can be made of: records, results and states are none, and a class of
the user's own never takes the name of another.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.abc
import importlib.util
import inspect
import keyword
import math
import operator
import pkgutil
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

ROOMS = ("diffusion", "distillation", "losses", "methods", "nets", "training", "domains")
"""The folders whose dataclasses can be parts of a run's configuration."""
MODULES = (
    *("runs.run", "runs.early_stopping", "teachers.network_config", "eval.picture_networks"),
    *("teachers.diffusers.network", "teachers.diffusers.scheduler_config"),
)
"""Such modules of other folders."""

LARGEST = 2**63
"""Whole numbers of a configuration are smaller: they become sizes and seeds of 64 bits."""


class OwnFile(NamedTuple):
    """A Python file of the user's own, with its content when it was read."""

    path: Path
    data: bytes

    @property
    def sha256(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @classmethod
    def read(cls, path: Path) -> OwnFile:
        """The file at `path`; ValueError where there is none."""
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        return cls(path, path.read_bytes())


_loaded: dict[str, OwnFile] = {}
"""Module name -> the user's own file that it was made from."""


@lru_cache(maxsize=1)
def known() -> dict[str, type]:
    """Every configuration class of the package, by name."""
    classes = _package()
    return _parts_of(classes["Run"], classes)


@lru_cache(maxsize=1)
def _package() -> dict[str, type]:
    """Every frozen dataclass of the package that a method could be made of."""
    names = [f"fewstep.{name}" for name in MODULES]
    for room in ROOMS:
        package = importlib.import_module(f"fewstep.{room}")
        names += [f"fewstep.{room}.{m.name}" for m in pkgutil.iter_modules(package.__path__)]
    classes: dict[str, type] = {}
    for name in names:
        classes |= _classes(importlib.import_module(name))
    return classes


def _classes(module: types.ModuleType) -> dict[str, type]:
    """The frozen dataclasses defined in a module."""
    return {
        value.__name__: value
        for value in vars(module).values()
        if isinstance(value, type)
        and is_dataclass(value)
        and value.__dataclass_params__.frozen  # type: ignore[attr-defined]
        and value.__module__ == module.__name__
    }


def _parts_of(root: type, classes: Mapping[str, type]) -> dict[str, type]:
    """Those of `classes` that `root` is made of: of its fields' types, of theirs, and so on."""
    parts: dict[str, type] = {}
    queue: list[Any] = [root]
    seen: list[Any] = []
    while queue:
        if (hint := queue.pop()) in seen:
            continue
        seen.append(hint)
        queue += typing.get_args(hint)
        if not _is_class(hint):
            continue
        for name, cls in classes.items():
            if issubclass(cls, hint):
                queue += typing.get_type_hints(cls).values()
                if not inspect.isabstract(cls):
                    parts[name] = cls
    return {name: cls for name, cls in classes.items() if name in parts}


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """The end of an error message: "; did you mean 'x'?" or "; choose from a, b, c"."""
    lower = {known.lower(): known for known in sorted(names)}
    if close := difflib.get_close_matches(name.lower(), lower, 1):
        return f"; did you mean {lower[close[0]]!r}?"
    return f"; choose from {', '.join(lower.values())}" if lower else ""


def encode(value: Any) -> Any:
    """A tree of dataclasses as JSON values; a dataclass becomes {"type": name, **fields}.

    ValueError where a name would be read as another class.
    """
    if is_dataclass(value) and not isinstance(value, type):
        _own_name(type(value))
        pairs = {name: encode(getattr(value, name)) for name in _fields(type(value))}
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


def _own_name(cls: type, path: Path | None = None) -> None:
    """A ValueError if another class has the name of `cls`, which is of the file `path`.

    The same file may be loaded again when it was edited.
    """
    other = known().get(cls.__name__)
    if other is None or other is cls:
        return
    file = _loaded.get(other.__module__)
    if file is not None and path is not None and file.path.resolve() == path.resolve():
        return
    whose = "one of fewstep" if file is None else f"one of {file.path}"
    where = cls.__module__ if path is None else path
    raise ValueError(
        f"{where}: the class {cls.__name__} has the name of {whose}; give it a name of its own"
    )


def _instances(value: Any) -> Iterator[Any]:
    """`value` and all dataclasses in it, however deep."""
    if is_dataclass(value) and not isinstance(value, type):
        yield value
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _instances(item)


def source(cls: type) -> OwnFile | None:
    """The user's own file that defines a class; None for a class of fewstep.

    ValueError for a class of no file, which nobody could find again.
    """
    module = cls.__module__
    if module in _loaded:
        return _loaded[module]
    if module.partition(".")[0] == "fewstep":
        return None
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None or not Path(path).is_file():
        raise ValueError(
            f"{cls.__name__} is of no file that a run could keep: put it in a file of its own, "
            f"and name it as FILE.py:{cls.__name__} or import it"
        )
    return OwnFile.read(Path(path))


def own_sources(value: Any) -> dict[str, OwnFile]:
    """Class name -> its file, for the parts of `value` that are the user's own."""
    sources = {type(part).__name__: source(type(part)) for part in _instances(value)}
    return {name: file for name, file in sources.items() if file is not None}


def own_files(value: Any) -> dict[str, str]:
    """Class name -> SHA-256 of its file, for the parts of `value` that are the user's own."""
    return {name: file.sha256 for name, file in own_sources(value).items()}


def decode(data: Any, expected: Any = object) -> Any:
    """The dataclass described by `encode`'s output, checked field by field."""
    if not isinstance(data, Mapping) or not isinstance(data.get("type"), str):
        raise ValueError(f"expected an expression such as Name(field=value), got {_short(data)}")
    name = data["type"]
    if name not in known():
        names = [key for key, cls in known().items() if issubclass(cls, expected)]
        raise ValueError(f"there is no {_short(name)}{nearest(name[:60], names)}")
    return build(known()[name], {k: v for k, v in data.items() if k != "type"}, expected)


def build(cls: type, values: Mapping[str, Any], expected: Any = object) -> Any:
    """cls(**values) with every value checked against the field's annotation."""
    names = _fields(cls)
    if not issubclass(cls, expected):
        raise ValueError(f"expected a {_named(expected)}, got {cls.__name__}")
    hints = typing.get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        if name not in names:
            shown = f"{_short(name)}{nearest(name[:60], names)}"
            raise ValueError(f"{cls.__name__} has no field {shown}")
        checked[name] = conform(value, hints[name], f"{cls.__name__}.{name}")
    try:
        return cls(**checked)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None


def _fields(cls: Any) -> list[str]:
    """What a configuration class is made of, in order.

    Class variables are not fields, and what a class finds out from other fields is no setting.
    """
    return [f.name for f in fields(cls) if f.init]


def conform(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; a ValueError says what `where` is and what came."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if len(options(hint)) > 1:
        for option in args:
            try:
                return conform(value, option, where)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(conform(item, args[0], where) for item in value)
        if len(args) == len(value):
            return tuple(conform(v, a, where) for v, a in zip(value, args, strict=True))
    elif origin is not None and isinstance(value, Mapping):
        return {key: conform(item, args[1], f"{where}[{key!r}]") for key, item in value.items()}
    elif _is_class(hint):
        if is_dataclass(value) and isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return decode(value, hint)
        if hint is float and type(value) in (int, float):
            return _float(value, where)
        if hint is float and value in ("inf", "-inf"):
            return float(value)
        if hint is int and type(value) is int and abs(value) >= LARGEST:
            raise ValueError(f"{where} is a whole number below 2^63 in size, got {_short(value)}")
        if type(value) is hint:
            return value
    raise ValueError(f"{where} is {_named(hint)}, got {_short(value)}")


def _named(hint: Any) -> str:
    """A type as an error message names it: "int | 'auto'"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if len(options(hint)) > 1:
        return " | ".join(map(_named, args))
    if origin is typing.Literal:
        return " | ".join(map(repr, args))
    if hint is type(None):
        return "None"
    return getattr(hint, "__name__", str(hint)) if origin is None else str(hint)


def _float(value: float, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{where} is too large a number: {_short(value)}") from None


def parse(text: str, expected: Any = object) -> Any:
    """The dataclass written as an expression: "Karras(tmax=800)", or "Karras" for its defaults."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return decode(_tree(tree), expected)
    except (SyntaxError, RecursionError, MemoryError):
        shown = _short(text)  # a text, quoted
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
        order = [f.name for f in fields(known()[name]) if f.init and not f.kw_only]
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


def _short(value: Any) -> str:
    """`value` as Python would write it, its middle left out where that is long."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:57]}...")
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python prints
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 400 else f"{text[:397]}..."


def configuration(text: str, expected: Any = object) -> Any:
    """The configuration written as "Name(field=value)" or "file.py:Name(field=value)"."""
    match = re.fullmatch(r"([^'\"]+?\.py):(\w+.*)", text, re.DOTALL)
    if match:
        load_classes(Path(match[1]))
        text = match[2]
    return parse(text, expected)


def fitting(hint: Any) -> dict[str, type]:
    """The configuration classes that values of the type `hint` may be of, by name."""
    classes = _classes_of(hint)
    return {name: cls for name, cls in known().items() if issubclass(cls, classes)}


def value_of(text: str, hint: Any, where: str) -> Any:
    """The value of the type `hint` that `text` describes; ValueError for any other.

    A part is written as `configuration` takes it, and all else as in an expression: own, None,
    ((0.1, 0.2), (0.3,)). where: what an error calls the value.
    """
    words = [arg for o in options(hint) for arg in typing.get_args(o) if isinstance(arg, str)]
    if text in words:
        return text
    if text.isidentifier() and text not in known() and not keyword.iskeyword(text):
        raise ValueError(
            f"there is no {_short(text)}{nearest(text[:60], [*fitting(hint), *words])}"
        )
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return configuration(text, reduce(operator.or_, _classes_of(hint) or (object,)))
    return conform(value, hint, where)


def options(hint: Any) -> tuple[Any, ...]:
    """The types that a value of the type `hint` may be of: those of a union, or `hint`."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _classes_of(hint: Any) -> tuple[type, ...]:
    """Those of the `options` of a type that are classes, None left out."""
    return tuple(o for o in options(hint) if _is_class(o) and o is not type(None))


def _is_class(hint: Any) -> bool:
    """Whether a type is a class and says something: to Python 3.10, tuple[int, ...] is one too."""
    return isinstance(hint, type) and typing.get_origin(hint) is None and hint is not object


class _Loader(importlib.abc.ExecutionLoader):
    """Runs the bytes that were read, and no others: neither a newer file nor a cached one."""

    def __init__(self, file: OwnFile) -> None:
        self.file = file

    def get_filename(self, fullname: str) -> str:
        """The path of the file, for tracebacks."""
        return str(self.file.path)

    def get_source(self, fullname: str) -> str:
        """The source text, from the bytes that were read."""
        return importlib.util.decode_source(self.file.data)


def load_classes(path: Path) -> types.ModuleType:
    """Run the user's own file and make the configuration classes in it known by name.

    ValueError where it cannot be run, or has a class of a name that is taken.
    """
    return load_own(OwnFile.read(path))


def load_own(file: OwnFile) -> types.ModuleType:
    """As `load_classes`, of a file that has been read.

    A file is run once, wherever a copy of it is.
    """
    name = f"file_{file.path.stem}_{file.sha256[:16]}"  # no name of an installed module
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.spec_from_loader(name, _Loader(file))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses look for their annotations
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, (Exception, SystemExit)):
                raise ValueError(_broken(file.path, error)) from error
            raise
    classes = _classes(module)
    for cls in classes.values():
        _own_name(cls, file.path)
    for cls in classes.values():  # and what it is made of, which no method here may have
        with suppress(NameError):
            known().update(_parts_of(cls, _package() | classes))
    known().update(classes)
    _loaded.setdefault(name, file)
    return module


def _broken(path: Path, error: BaseException) -> str:
    """Where and why the user's own file cannot be run."""
    if isinstance(error, SyntaxError):
        at = f", line {error.lineno}" if error.lineno else ""
        return f"{error.filename or path}{at}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
    where = f"{path}, line {line}" if line else f"{path}"
    return f"{where}: {type(error).__name__}: {error}"
