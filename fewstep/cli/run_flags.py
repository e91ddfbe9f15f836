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
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
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

MARKERS = (tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed)
"""How flags are made: of what a run has now, and of no field that is given whole."""
MEANING = 8
"""The least indentation of what a flag means, where it stands below the flag."""
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
        field = flag_syntax.field_of(run, path) if name.startswith("--") else None
        if field is not None and not flag_syntax.is_plain(field[0]):
            accepts = partial(_accepted, run, path)
            if not value and not queue:
                example = flag_syntax.example(*field, accepts)
                shown = command_line([name, example])
                raise ValueError(
                    f"{name} is an expression, written like {shown}; nothing came after it"
                )
            text = value or queue.pop(0)
            parts.append((".".join(path), name, text))
            try:
                run = _put(run, path, config.value_of(text, field[0], name))
            except ValueError as error:
                raise flag_syntax.part(name, *field, text, error, accepts) from None
        else:
            rest.append(flag)
    rest = [_long(run, word) for word in rest]
    parts += [(".".join(_path(name)), name, " ".join(words)) for name, words in _given(rest)]
    tell_repeated(parts)
    errors, out = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(out):
            run = tyro.cli(Run, default=run, args=rest, prog=prog, config=MARKERS)
    except SystemExit as stop:
        if stop.code:
            text = _unboxed(errors.getvalue() + out.getvalue())
            told = _misspelt(run, rest, text) or _inside(run, text) or _sentence(text, others)
            raise ValueError(told) from None
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
            accepts = partial(_accepted, run, _path(name))
            return flag_syntax.wrong(short.get(name, name), *field, " ".join(values), accepts)
    return ""


def _inside(run: Run, told: str) -> str:
    """How a part is given whole, where `told` names a flag inside it that is not there, or ""."""
    stray = re.search(r"Unrecognized options?: (--[\w.-]+)", told)
    path = _path(stray[1]) if stray else []
    for depth in range(1, len(path)):
        field = flag_syntax.field_of(run, path[:depth])
        if field is None or flag_syntax.is_plain(field[0]):
            break
        if not flag_syntax.opened(*field):
            flag = f"--{'.'.join(path[:depth]).replace('_', '-')}"
            example = flag_syntax.example(*field, partial(_accepted, run, path[:depth]))
            return f"{flag} has no flags inside; give it whole: {command_line([flag, example])}"
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
        tyro.cli(Run, default=run, args=["--help"], prog=prog, config=MARKERS)
    short = [
        f"{name} is short for {full}.\n"
        for name, full in SHORT.items()
        if flag_syntax.field_of(run, _path(full))
    ]
    shown = _flowing(out.getvalue().partition("\n\n")[2].rstrip())
    return "\n".join([shown, "", _whole(run), *short])


def _flowing(text: str) -> str:
    """tyro's page of flags, each meaning one paragraph: it keeps the line breaks of the source."""
    lines, columns = [""], [0]
    for line in map(str.rstrip, text.splitlines()):
        body = line.strip()
        indent = len(line) - len(body)
        if body and indent == columns[-1] > 0:
            split = lines[-1].endswith(",") and body.startswith("000")  # 10,000 at a line's end
            lines[-1] += body if split else f" {body}"
            continue
        beside = re.match(r"  --?\w.*?\s{2,}(?=\S)", line)
        columns.append(beside.end() if beside else indent if indent >= MEANING else 0)
        lines.append(line)
    width = shutil.get_terminal_size().columns - 1
    wrap = partial(textwrap.wrap, width=width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(
        part
        for line, column in zip(lines[1:], columns[1:], strict=True)
        for part in (wrap(line, subsequent_indent=column * " ") if column else [line])
    )


def _whole(run: Run) -> str:
    """What has no flags inside, and is given as an expression."""
    lines = [" parts and lists that are given whole", f" {78 * '-'}"]
    for flag, hint, present, meaning in flag_syntax.given_whole(run):
        lines.append(f"  {flag} {flag_syntax.placeholder(hint)}")
        example = flag_syntax.example(hint, present, partial(_accepted, run, _path(flag)))
        text = f"{meaning} Such as {command_line([flag, example])}"
        lines += textwrap.wrap(text, 79, initial_indent=27 * " ", subsequent_indent=27 * " ")
    return "\n".join(lines) + "\n"


def _put(node: Any, path: Sequence[str], value: Any) -> Any:
    """`node` with `value` in place of the field at `path`; ValueError where it will not do."""
    name, *deeper = path
    return replace(node, **{name: _put(getattr(node, name), deeper, value) if deeper else value})


def _accepted(run: Run, path: Sequence[str], value: Any) -> bool:
    """Whether the field at `path` can be `value`."""
    with contextlib.suppress(ValueError):
        _put(run, path, value)
        return True
    return False


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
