"""Any field of a `Run` from the command line, typed, with the nearest name for a misspelling.

Scalars have a flag each (--steps 500, --method.alpha 1.0). A part that is itself a configuration
can be replaced whole, by an expression (--method "SIM()", --method.times "LogNormal(std=2)"), or
by a class in a file of one's own (--method my_method.py:MyMethod).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import tyro

from fewstep import spec
from fewstep.recipes.run import Run

HINTS = {"--prompts": "; prompts are named by --domain \"Prompts('FILE')\""}
"""What is meant by flags of other verbs."""


def resolve(run: Run, args: Sequence[str], prog: str, others: Sequence[str] = ()) -> Run:
    """`run` with the flags `args` applied; a ValueError of one sentence where one is wrong.

    `others` are flags that mean something elsewhere: only suggestions for a misspelling.
    """
    rest: list[str] = []
    queue = list(args)
    while queue:
        flag = queue.pop(0)
        name, _, value = flag.partition("=")
        path = name.removeprefix("--").replace("-", "_").split(".")
        if name.startswith("--") and is_dataclass(part := _look(run, path)):
            if not value and not queue:
                example = part() if isinstance(part, type) else part
                raise ValueError(f"{name} needs a value, such as {example!r}")
            run = _put(run, path, value or queue.pop(0))
        else:
            rest.append(flag)
    errors, out = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(out):
            return tyro.cli(
                Run, default=run, args=rest, prog=prog, config=(tyro.conf.AvoidSubcommands,)
            )
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_sentence(errors.getvalue() + out.getvalue(), others)) from None
        raise


def help_text(run: Run, prog: str) -> str:
    """All fields of `run` with their types, meanings and present values."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(
            Run, default=run, args=["--help"], prog=prog, config=(tyro.conf.AvoidSubcommands,)
        )
    return out.getvalue().partition("\n\n")[2]


def _look(node: Any, path: Sequence[str]) -> Any:
    """The value of the field at `path`, its class where it is optional and unset, or None."""
    for name in path:
        if name not in getattr(node, "__dataclass_fields__", ()) or isinstance(node, type):
            return None
        hint = typing.get_type_hints(type(node))[name]
        node = getattr(node, name)
        if node is None:
            node = next((option for option in typing.get_args(hint) if is_dataclass(option)), None)
    return node


def _put(node: Any, path: Sequence[str], text: str) -> Any:
    """`node` with the configuration at `path` replaced by the one that `text` describes."""
    name, *deeper = path
    if deeper:
        return replace(node, **{name: _put(getattr(node, name), deeper, text)})
    hint = typing.get_type_hints(type(node))[name]
    return replace(node, **{name: spec.configuration(text, hint)})


def _sentence(box: str, others: Sequence[str]) -> str:
    """The message inside tyro's box, as one sentence."""
    lines = [re.sub(r"^[\s│|]+|[\s│|]+$", "", line) for line in box.splitlines()]
    text = " ".join(line for line in lines if not re.match(r"^([╭╰─+]|-{3})", line))
    if unknown := re.search(r"Unrecognized options?: (\S+?),? ", text + " "):
        name = unknown[1].partition("=")[0]
        fields = [f"--{f.name}".replace("_", "-") for f in dataclasses.fields(Run)]
        close = difflib.get_close_matches(name, [*others, *fields], 1, cutoff=0.8)
        close += re.findall(r"--[\w.-]+", text.partition("Perhaps you meant")[2])
        hint = f"; did you mean {close[0]}?" if close else "; --help lists the fields"
        hint = HINTS.get(name, hint)
        return f"there is no {'flag' if name.startswith('-') else 'argument'} {name}{hint}"
    if wrong := re.search(r"Error parsing (--[\w.-]+): (.+?)(?: Argument helptext|$)", text):
        return f"{wrong[1]}: {wrong[2].strip()}"
    text = re.split(r" For full helptext", text)[0]
    lead = r"^\s*(Value error|Invalid choice|Missing argument)\s+|Error parsing [\w.]+: "
    return re.sub(lead, "", text).strip()
