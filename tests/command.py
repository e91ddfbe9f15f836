"""The command line within this process, and runs too small to be good but whole."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

from fewstep import cli

SMALL = ("--model.net.width", "16", "--model.net.blocks", "1", "--batch", "8")
TEACH = ("train", "digits_teacher", *SMALL, "--steps", "30", "--sample-every", "15")
DISTIL = (
    "distill",
    "digits",
    *SMALL,
    "--steps",
    "20",
    "--sample-every",
    "10",
    "--save-every",
    "8",
)


class Result(NamedTuple):
    """What a person, or a script, sees of a command."""

    code: int
    out: str
    err: str


def fewstep(*args: str) -> Result:
    """Run `fewstep args`."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(list(args))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder; None for folders."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def bits(folder: Path) -> dict[str, bytes | None]:
    """The same but for which run wrote it: what two runs of one command have in common."""
    found = tree(folder)
    for name, data in found.items():
        if name.endswith("manifest.json") and data is not None:
            facts = {k: v for k, v in json.loads(data).items() if k not in ("origin", "self")}
            found[name] = json.dumps(facts).encode()
    return found
