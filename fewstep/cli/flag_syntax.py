"""How the value of a flag is written: one sentence, with an example of its type.

wrong("--model.shape", tuple[int, ...], (), "3,8,8")
  -> "--model.shape is whole numbers with spaces between, written like --model.shape 3 8 8;
      got '3,8,8'"
"""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from fewstep import config
from fewstep.runs.command_line import command_line

SHOWN = 60
"""Characters of a value that are repeated to the person."""
ONE: dict[Any, tuple[str, str, str]] = {
    int: ("a whole number", "whole numbers", "3"),
    float: ("a number", "numbers", "0.5"),
    str: ("a text", "texts", "name"),
    Path: ("a path", "paths", "folder"),
}
"""Type -> what it is called, what several are called, an example."""
LISTS: dict[Any, list[str]] = {int: ["3", "8", "8"], float: ["0.05", "0.1"], str: ["a", "b"]}
"""Examples of lists of any length."""


def wrong(flag: str, hint: Any, present: Any, got: str) -> str:
    """A sentence for a value `got` that is not of the type `hint`.

    present: the value that the flag has now, which is the example where it can be one.
    """
    kind, example = written(hint, present)
    if hint is bool:
        home, dot, name = flag.removeprefix("--").rpartition(".")
        return f"{flag} takes no value: write {flag} or --{home}{dot}no-{name}; got {short(got)}"
    given = f"got {short(got)}" if got else "nothing came after it"
    return f"{flag} is {kind}, written like {command_line([flag, *example])}; {given}"


def written(hint: Any, present: Any = None) -> tuple[str, list[str]]:
    """What values of a type are called, and the words of an example on a command line."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union or origin is types.UnionType:
        rest = [option for option in args if option is not type(None)]
        kind, example = written(rest[0], present)
        others = [v for option in rest[1:] for v in _words(option)]
        others += ["None"] if len(rest) < len(args) else []
        return " or ".join([kind, *others]), example
    if origin is typing.Literal:
        now = args[0] if present is None else present
        return f"one of {', '.join(map(str, args))}", [str(now)]
    if origin is tuple:
        return _several(args, present)
    one, _, usual = ONE.get(hint, ("a value", "values", "VALUE"))
    return one, [usual if present is None or present == "" else str(present)]


def _words(hint: Any) -> list[str]:
    """The texts that a type consists of, if it does."""
    literal = typing.get_origin(hint) is typing.Literal
    return [str(value) for value in typing.get_args(hint)] if literal else []


def _several(args: tuple[Any, ...], present: Any) -> tuple[str, list[str]]:
    """The same of a tuple."""
    endless = args[1:] == (Ellipsis,)
    kind = ONE.get(args[0], ("", "values", "VALUE"))[1]
    count = "" if endless else f"{len(args)} "
    items = list(present or ())
    example = LISTS.get(args[0], ["VALUE"]) if endless else [written(a)[1][0] for a in args]
    return f"{count}{kind} with spaces between", [str(item) for item in items] or example


def part(flag: str, hint: Any, present: Any, text: str, error: ValueError) -> ValueError:
    """The error of a whole part that `text` does not describe, with the right spelling.

    A text that is a value of one of the part's own fields is most likely meant so: 8 is
    LoRA(rank=8), my.txt is Prompts(file='my.txt').
    """
    if "(" in text or ".py:" in text or text.isidentifier():  # whose own error says what is wrong
        return ValueError(f"{flag}: {error}")
    meant = _meant(present if isinstance(present, type) else type(present), text)
    if meant:
        return ValueError(f"{flag} is an expression; did you mean {command_line([flag, meant])}?")
    kind = getattr(hint, "__name__", "")
    names = sorted(n for n, cls in config.known().items() if kind and issubclass(cls, hint))
    choice = f" (one of {', '.join(names)})" if len(names) > 1 else ""
    return ValueError(
        f"{flag} is an expression{choice}, written like "
        f"{command_line([flag, example(present)])}; got {short(text)}"
    )


def _meant(cls: Any, text: str) -> str:
    """cls(field=text) for the field of `cls` that such a value is most likely of, or ""."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    annotated = list(vars(cls).get("__annotations__", ()))
    hints = {n: h for n, h in typing.get_type_hints(cls).items() if n in annotated and is_plain(h)}
    for name in sorted(hints, key=lambda name: hints[name] is not type(value)):
        try:
            configuration = cls(**{name: config.conform(value, hints[name], name)})
        except (ValueError, TypeError):
            continue
        return f"{cls.__name__}({name}={getattr(configuration, name)!r})"
    return ""


def is_plain(hint: Any) -> bool:
    """Whether values of a type are numbers, texts, or lists of these, and no parts."""
    return not any(is_dataclass(option) for option in (hint, *typing.get_args(hint)))


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


def unset(node: Any, prefix: str = "--") -> list[tuple[str, Any, str]]:
    """Parts that are not there unless they are given: (flag, class, what the field means)."""
    parts = []
    for field in fields(node):
        value, hint = getattr(node, field.name), typing.get_type_hints(type(node))[field.name]
        flag = f"{prefix}{field.name.replace('_', '-')}"
        if is_dataclass(value):
            parts += unset(value, f"{flag}.")
        elif value is None:
            options = [option for option in typing.get_args(hint) if is_dataclass(option)]
            parts += [(flag, option, _meaning(type(node), field.name)) for option in options]
    return parts


def _meaning(cls: type, name: str) -> str:
    """The text below the field `name` in the source of a class, as a paragraph."""
    (body,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(body, ast.ClassDef)
    for line, after in zip(body.body, body.body[1:], strict=False):
        named = isinstance(line, ast.AnnAssign) and getattr(line.target, "id", "") == name
        if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return " ".join(str(after.value.value).split())
    return ""


def example(part: Any) -> str:
    """How a part, or its class, is written: with its first plain field."""
    node = part() if isinstance(part, type) else part
    hints = typing.get_type_hints(type(node))
    first = next((f.name for f in fields(node) if is_plain(hints[f.name])), "")
    value = f"{first}={getattr(node, first)!r}" if first else ""
    return f"{type(node).__name__}({value})"
