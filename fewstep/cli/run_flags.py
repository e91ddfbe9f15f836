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
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import tyro

from fewstep import config
from fewstep.cli import flag_syntax
from fewstep.cli.parser import tell_repeated
from fewstep.cli.progress_bar import say
from fewstep.diffusion.model import OfTeacher
from fewstep.diffusion.noise_path import Flow
from fewstep.distillation.default_times import with_times_of
from fewstep.runs.command_line import command_line
from fewstep.runs.run import Run

SHORT = {"--prompts": "--domain.file"}
"""Shorter names of fields."""


def resolve(run: Run, args: Sequence[str], prog: str, others: Sequence[str] = ()) -> Run:
    """`run` with the flags `args` applied; a ValueError of one sentence where one is wrong.

    `others` are flags that mean something elsewhere: only suggestions for a misspelling.
    --prompts FILE is short for the file of a domain of prompts.
    """
    rest: list[str] = []
    parts: list[tuple[str, str, str]] = []
    queue = list(args)
    while queue:
        flag = queue.pop(0)
        name, _, value = flag.partition("=")
        path = _path(name)
        if name.startswith("--") and is_dataclass(part := _look(run, path)):
            if not value and not queue:
                example = part() if isinstance(part, type) else part
                raise ValueError(f"{name} needs a value, such as {example!r}")
            text = value or queue.pop(0)
            parts.append((".".join(path), name, text))
            try:
                run = _put(run, path, text)
            except ValueError as error:
                hint, _ = flag_syntax.field_of(run, path) or (None, None)
                raise flag_syntax.part(name, hint, part, text, error) from None
        else:
            rest.append(flag)
    rest = [_long(run, word) for word in rest]
    parts += [(".".join(_path(name)), name, " ".join(words)) for name, words in _given(rest)]
    tell_repeated(parts)
    errors, out = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(out):
            run = tyro.cli(
                Run, default=run, args=rest, prog=prog, config=(tyro.conf.AvoidSubcommands,)
            )
    except SystemExit as stop:
        if stop.code:
            text = _unboxed(errors.getvalue() + out.getvalue())
            raise ValueError(_misspelt(run, rest, text) or _sentence(text, others)) from None
        raise
    return _on_its_path(run)


def _on_its_path(run: Run) -> Run:
    """The run with its method's defaults in the times of its teacher's path, which is told."""
    if not run.distils or isinstance(run.model.net, OfTeacher):
        return run
    method = with_times_of(run.method, run.model.path)
    if method != run.method:
        kind = "a flow" if isinstance(run.model.path, Flow) else type(run.model.path).__name__
        say(
            f"{type(method).__name__}'s defaults are noise levels; on the times of this teacher "
            f"({kind}) what was left at them is moved, and it samples by {method.sampler}"
        )
    return replace(run, method=method)


def _long(run: Run, word: str) -> str:
    """A short name as the field that it stands for; a ValueError where the run has none."""
    name, equals, value = word.partition("=")
    if name not in SHORT:
        return word
    full = SHORT[name]
    if flag_syntax.field_of(run, _path(full)) is None:
        kind = type(run.domain).__name__
        raise ValueError(f"{name} names a file of prompts, and this run's domain is {kind}")
    return f"{full}{equals}{value}"


def _misspelt(run: Run, words: Sequence[str], told: str) -> str:
    """How the flag is written whose value could not be read, where `told` names one, or "".

    words: the command line; told: what its parser said of it.
    """
    names = re.findall(r"--[A-Za-z][\w.-]*", told.partition("Argument helptext")[0])
    stray = re.search(r"Unrecognized options?: (\S+?),? ", told + " ")
    if stray and stray[1].startswith("-"):
        return ""  # no field of the run
    given = _given(words)
    if stray:  # a value too many belongs to the flag before it
        names = [name for name, values in given if stray[1] in values]
    short = {full: name for name, full in SHORT.items()}
    for name in names:
        field = flag_syntax.field_of(run, _path(name))
        values = next((v for n, v in given if _path(n) == _path(name)), None)
        if field is None or values is None or (field[0] is bool and not values):
            continue  # what is said of a flag without a value is not that it has one
        if not stray or field[0] is bool or len(values) > 1:
            return flag_syntax.wrong(short.get(name, name), *field, " ".join(values))
    return ""


def _path(name: str) -> list[str]:
    """The fields that a flag names."""
    return name.removeprefix("--").replace("-", "_").split(".")


def _given(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words that follow it, or come after its "="."""
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if re.match(r"--[A-Za-z]", word):
            name, equals, value = word.partition("=")
            flags.append((name, [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
    return flags


def help_text(run: Run, prog: str) -> str:
    """All fields of `run` with their types, meanings and present values."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(
            Run, default=run, args=["--help"], prog=prog, config=(tyro.conf.AvoidSubcommands,)
        )
    short = [
        f"{name} is short for {full}.\n"
        for name, full in SHORT.items()
        if flag_syntax.field_of(run, _path(full))
    ]
    return "\n".join([out.getvalue().partition("\n\n")[2].rstrip(), "", _unset(run), *short])


def _unset(run: Run) -> str:
    """The parts that a run has only where they are given."""
    lines = [" parts that are not there unless they are given, whole", f" {78 * '-'}"]
    for flag, cls, meaning in flag_syntax.unset(run):
        lines.append(f"  {flag} {cls.__name__.upper()}")
        text = f"{meaning} Such as {command_line([flag, flag_syntax.example(cls)])}"
        lines += textwrap.wrap(text, 79, initial_indent=27 * " ", subsequent_indent=27 * " ")
    return "\n".join(lines) + "\n"


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
    return replace(node, **{name: config.configuration(text, hint)})


def _unboxed(box: str) -> str:
    """The words inside tyro's box."""
    lines = [re.sub(r"^[\s│|]+|[\s│|]+$", "", line) for line in box.splitlines()]
    return " ".join(line for line in lines if not re.match(r"^([╭╰─+]|-{3})", line))


def _sentence(text: str, others: Sequence[str]) -> str:
    """What tyro says, as one sentence."""
    if unknown := re.search(r"Unrecognized options?: (\S+?),? ", text + " "):
        name = unknown[1].partition("=")[0]
        fields = [f"--{f.name}".replace("_", "-") for f in dataclasses.fields(Run)]
        close = difflib.get_close_matches(name, [*others, *SHORT, *fields], 1, cutoff=0.8)
        close += re.findall(r"--[\w.-]+", text.partition("Perhaps you meant")[2])
        hint = f"; did you mean {close[0]}?" if close else "; --help lists the fields"
        return f"there is no {'flag' if name.startswith('-') else 'argument'} {name}{hint}"
    if wrong := re.search(r"Error parsing (--[\w.-]+): (.+?)(?: Argument helptext|$)", text):
        return f"{wrong[1]}: {wrong[2].strip()}"
    text = re.split(r" For full helptext", text)[0]
    lead = r"^\s*(Value error|Invalid choice|Missing argument)\s+|Error parsing [\w.]+: "
    return re.sub(lead, "", text).strip()
