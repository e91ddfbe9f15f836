"""How the value of a flag is written: one sentence, with an example of its type.

wrong("--model.shape", tuple[int, ...], (), "3,8,8")
  -> "--model.shape is whole numbers with spaces between, written like --model.shape 3 8 8;
      got '3,8,8'"
"""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from fewstep import config
from fewstep.runs.command_line import command_line

Accepts = Callable[[Any], bool]
"""Whether a value will do as that of a flag."""
SHOWN = 60
"""Characters of a value that are repeated to the person."""
ONE: dict[Any, tuple[str, str, str]] = {
    int: ("a whole number", "whole numbers", "3"),
    float: ("a number", "numbers", "0.5"),
    str: ("a text", "texts", "name"),
    Path: ("a path", "paths", "folder"),
}
"""Type -> what it is called, what several are called, an example."""
LISTS: dict[Any, list[tuple[Any, ...]]] = {
    int: [(3, 8, 8), (8, 4, 2), (1,)],
    float: [(0.05, 0.1), (0.1, 0.05), (1.0, 5.0)],
    str: [("a", "b")],
}
"""Examples of lists, one of which will do where the numbers are bound to one another."""


def wrong(
    flag: str, hint: Any, present: Any, got: str, accepts: Accepts = lambda value: True
) -> str:
    """A sentence for a value `got` that is not of the type `hint`.

    present: the value that the flag has now, which is the example where it can be one.
    accepts: whether an example will do.
    """
    kind, example = written(hint, present, accepts)
    if hint is bool:
        home, dot, name = flag.removeprefix("--").rpartition(".")
        return f"{flag} takes no value: write {flag} or --{home}{dot}no-{name}; got {short(got)}"
    given = f"got {short(got)}" if got else "nothing came after it"
    return f"{flag} is {kind}, written like {command_line([flag, *example])}; {given}"


def written(
    hint: Any, present: Any = None, accepts: Accepts = lambda value: True
) -> tuple[str, list[str]]:
    """What values of a type are called, and the words of an example on a command line."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if len(config.options(hint)) > 1:
        rest = [option for option in args if option is not type(None)]
        kind, example = written(rest[0], present, accepts)
        others = [v for option in rest[1:] for v in _words(option)]
        others += ["None"] if len(rest) < len(args) else []
        return " or ".join([kind, *others]), example
    if origin is typing.Literal:
        now = args[0] if present is None else present
        return f"one of {', '.join(map(str, args))}", [str(now)]
    if origin is tuple:
        return _several(args, present, accepts)
    one, _, usual = ONE.get(hint, ("a value", "values", "VALUE"))
    return one, [usual if present is None or present == "" else str(present)]


def _words(hint: Any) -> list[str]:
    """The texts that a type consists of, if it does."""
    literal = typing.get_origin(hint) is typing.Literal
    return [str(value) for value in typing.get_args(hint)] if literal else []


def placeholder(hint: Any) -> str:
    """What a value given whole is called in --help: LORA | NONE, {fake,own} | PICTUREFEATURES."""
    words = _choices(hint)
    kinds = [getattr(o, "__name__", "").replace("Type", "").upper() for o in config.options(hint)]
    kinds = ["(...)" if kind == "TUPLE" else kind for kind in kinds if kind != "LITERAL"]
    return " | ".join([*([f"{{{','.join(words)}}}"] if words else []), *kinds])


def _several(args: tuple[Any, ...], present: Any, accepts: Accepts) -> tuple[str, list[str]]:
    """The same of a tuple."""
    endless = args[1:] == (Ellipsis,)
    kind = ONE.get(args[0], ("", "values", "VALUE"))[1]
    usual = LISTS.get(args[0], [])
    if not endless:
        usual = [tuple(x for _, x in zip(args, value, strict=False)) for value in usual]
    usual = [present] if present else usual
    items = next(filter(accepts, usual), usual[0] if usual else ("VALUE",))
    count = "" if endless else f"{len(args)} "
    return f"{count}{kind} with spaces between", [str(item) for item in items]


def part(
    flag: str, hint: Any, present: Any, text: str, error: ValueError, accepts: Accepts
) -> ValueError:
    """The error of a value given whole that `text` does not describe, with the right spelling.

    A text that is a value of one of the part's own fields is most likely meant so: 8 is
    LoRA(rank=8), my.txt is Prompts(file='my.txt').
    """
    if "(" in text or ".py:" in text or text.isidentifier():  # whose own error says what is wrong
        told = str(error)
        return ValueError(told if told.startswith(flag) else f"{flag}: {told}")
    kinds = config.fitting(hint)
    kind = type(present) if is_dataclass(present) else next(iter(kinds.values()), object)
    for value, meant in _meant(kind, text) if is_dataclass(present) or len(kinds) == 1 else ():
        if accepts(value):
            likely = command_line([flag, meant])
            return ValueError(f"{flag} is an expression; did you mean {likely}?")
    names = [*_choices(hint), *sorted(kinds)]
    choice = f" (one of {', '.join(names)})" if len(names) > 1 else ""
    return ValueError(
        f"{flag} is an expression{choice}, written like "
        f"{command_line([flag, example(hint, present, accepts)])}; got {short(text)}"
    )


def _meant(cls: Any, text: str) -> Iterator[tuple[Any, str]]:
    """cls(field=text), and how it is written: for every field it may be of, likeliest first."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    annotated = list(vars(cls).get("__annotations__", ()))
    hints = {n: h for n, h in typing.get_type_hints(cls).items() if n in annotated and is_plain(h)}
    for name in sorted(hints, key=lambda name: hints[name] is not type(value)):
        with suppress(ValueError, TypeError):
            configuration = cls(**{name: config.conform(value, hints[name], name)})
            yield configuration, f"{cls.__name__}({name}={getattr(configuration, name)!r})"


def _choices(hint: Any) -> list[str]:
    """The texts that values of a type may be."""
    return [word for option in config.options(hint) for word in _words(option)]


def is_plain(hint: Any) -> bool:
    """Whether values of a type are numbers, texts, or lists of these.

    All others, parts and lists of lists, are given whole, as an expression.
    """
    inside = [arg for option in config.options(hint) for arg in typing.get_args(option)]
    nested = any(typing.get_origin(arg) is tuple for arg in inside)
    return not nested and not config.fitting(hint)


def opened(hint: Any, value: Any) -> bool:
    """Whether a field has flags for what is inside its value.

    Of a type that is a union, only values of its own concrete parts do.
    """
    kinds = config.options(hint)
    own = any(isinstance(k, type) and is_dataclass(k) and isinstance(value, k) for k in kinds)
    return is_dataclass(value) and (own or len(kinds) == 1)


def short(text: str) -> str:
    """`text` in quotes, its end left out where it is long."""
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")


def field_of(node: Any, path: Iterable[str]) -> tuple[Any, Any] | None:
    """(type, present value) of the field at `path` in a configuration, or None."""
    hint: Any = None
    for name in path:
        if name not in getattr(node, "__dataclass_fields__", ()) or isinstance(node, type):
            return None
        hint = typing.get_type_hints(type(node))[name]
        node = getattr(node, name)
    return hint, node


def given_whole(node: Any, prefix: str = "--") -> list[tuple[str, Any, Any, str]]:
    """What is no part now and has no flags inside: (flag, type, present value, meaning)."""
    found = []
    for field in fields(node):
        value, hint = getattr(node, field.name), typing.get_type_hints(type(node))[field.name]
        flag = f"{prefix}{field.name.replace('_', '-')}"
        if opened(hint, value):
            found += given_whole(value, f"{flag}.")
        elif field.init and not is_plain(hint):
            found.append((flag, hint, value, _meaning(type(node), field.name)))
    return found


def _meaning(cls: type, name: str) -> str:
    """The text below the field `name` in the source of a class, as a paragraph."""
    (body,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(body, ast.ClassDef)
    for line, after in zip(body.body, body.body[1:], strict=False):
        named = isinstance(line, ast.AnnAssign) and getattr(line.target, "id", "") == name
        if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return " ".join(str(after.value.value).split())
    return ""


def example(hint: Any, present: Any, accepts: Accepts) -> str:
    """How a value given whole is written: the present one, or the first that is accepted."""
    if present is not None:
        return _written(present)
    for cls in config.fitting(hint).values():
        with suppress(ValueError, TypeError, StopIteration):
            if accepts(value := _made(cls)):
                return _written(value)
    return "None"


def _made(cls: Any) -> Any:
    """A part of a class by its defaults; parts that have none are made in the same way."""
    hints = typing.get_type_hints(cls)
    needed = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]
    parts = {name: next(iter(config.fitting(hints[name]).values())) for name in needed}
    return cls(**{name: _made(kind) for name, kind in parts.items()})


def _written(value: Any) -> str:
    """A value as an expression: a text, a list, or a part with its first plain field."""
    if not is_dataclass(value):
        return value if isinstance(value, str) else repr(value)
    hints = typing.get_type_hints(type(value))
    shown = [f.name for f in fields(value) if f.default is f.default_factory is MISSING]
    shown = shown or [f.name for f in fields(value) if is_plain(hints[f.name])][:1]
    settings = ", ".join(f"{name}={getattr(value, name)!r}" for name in shown)
    return f"{type(value).__name__}({settings})"
