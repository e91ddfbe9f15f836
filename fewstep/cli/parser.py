"""Argument parsing whose errors are one sentence."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

from fewstep.cli import flag_syntax
from fewstep.cli.output import output_flags

TEACHER = "where the run's teacher is now, if it was moved: checked by digest, and recorded"
FEATURES = (
    "Inception's weights, a DINOv2 folder, or my_file.py:Name (default: what "
    "FEWSTEP_INCEPTION names)"
)
CODE = (
    "a file of your own that the model was made with, such as RUN/code/my_method.py; it is run "
    "where its SHA-256 is the recorded one"
)
SIZE = "of the pictures, such as 1024x768, of text-to-image pipelines (default: the model's own)"
VAE = "folder of the autoencoder that decodes latents (default: what FEWSTEP_VAE names)"
VAE_OR_NONE = f"{VAE}; none: latents are given as they are"


def printable(text: str) -> str:
    """`text` with escapes for what would not be seen, or would control a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fail(message: str) -> NoReturn:
    """Print one sentence to standard error and exit with code 2."""
    print(f"fewstep: {printable(' '.join(message.split()))}", file=sys.stderr)
    raise SystemExit(2)


def _name(action: argparse.Action) -> str:
    """What argparse calls an action in its errors."""
    return "/".join(action.option_strings) or str(action.metavar or action.dest)


class Parser(argparse.ArgumentParser):
    """An argparse parser that fails with one sentence, and the nearest name for a misspelling."""

    def error(self, message: str) -> NoReturn:
        """Exit with one sentence on the mistake, and the nearest flag for a misspelling."""
        label, _, rest = message.partition(": ")
        if label == "unrecognized arguments":
            flag = rest.split()[0].partition("=")[0]
            close = difflib.get_close_matches(flag, self.flags(), 1)
            hint = f"; did you mean {close[0]}?" if close else f"; {self.prog} --help lists them"
            fail(f"there is no {'flag' if flag.startswith('-') else 'argument'} {flag}{hint}")
        if label == "the following arguments are required":
            fail(f"{self.prog} needs: {rest}; {self.prog} --help tells more")
        fail(self._misspelt(message) or message.removeprefix("argument "))

    def _misspelt(self, message: str) -> str:
        """How the flag or argument is written whose value could not be read, or ""."""
        match = re.fullmatch(r"argument ([^:]+): (invalid|expected) (.*)", message)
        action = next((a for a in self._actions if match and _name(a) == match[1]), None)
        if match is None or action is None:
            return ""
        hint: Any = Literal[tuple(action.choices)] if action.choices else action.type or str
        many = isinstance(action.nargs, int) or action.nargs in ("+", "*")
        present = action.default if action.default not in (None, argparse.SUPPRESS) else None
        if many and not action.choices:
            hint = tuple[hint, ...]
        elif isinstance(present, (list, tuple)):
            present = None
        value = re.search(r"(?:value|choice): '(.*?)'(?: \(choose|$)", match[3])
        if not action.option_strings:
            kind = flag_syntax.written(hint)[0]
            return f"{match[1]} is {kind}; got {value[1] if value else 'none'}"
        if value is None and hint in (str, Path):
            return f"{action.option_strings[-1]} needs a value: {action.help}"
        flag = action.option_strings[-1]
        return flag_syntax.wrong(flag, hint, present, value[1] if value else "")

    def flags(self) -> list[str]:
        """The long flags of this parser."""
        return [name for name in self._option_string_actions if name.startswith("--")]


def refuse_missing(*paths: Path) -> None:
    """Fail where a file or folder that a verb reads is not there."""
    for path in paths:
        if not path.exists():
            fail(f"there is no file or folder {path}")


def code_flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add --code FILE, which may be given several times.

    The verb passes them to `fewstep.storage.user_code.trust`.
    """
    parser.add_argument(
        "--code", type=Path, action="append", default=[], metavar="FILE", help=CODE
    )


def verb_parser(verb: str, text: str, **options: Any) -> Parser:
    """The parser of one verb, with the flags that all have; flags are written in full."""
    parser = Parser(prog=f"fewstep {verb}", description=text, allow_abbrev=False, **options)
    output_flags(parser)
    return parser
