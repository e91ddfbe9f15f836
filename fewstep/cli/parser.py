"""Argument parsing whose errors are one sentence."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from fewstep.cli import flag_syntax
from fewstep.cli.output import output_flags
from fewstep.cli.progress_bar import say

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


def require_finite(flag: str, scale: float) -> None:
    """ValueError where the scale that a flag gives is not finite, such as 1e400."""
    if not math.isfinite(scale):
        raise ValueError(f"{flag} is a finite scale, got {scale}")


def _name(action: argparse.Action) -> str:
    """What argparse calls an action in its errors."""
    return "/".join(action.option_strings) or str(action.metavar or action.dest)


class Parser(argparse.ArgumentParser):
    """An argparse parser that fails with one sentence, and the nearest name for a misspelling.

    An empty value, as of a shell's variable that is not set, is refused: as a path it would be
    the present folder. Of a flag that is given twice the last counts, which is told.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does it, once empty values are refused; then tells what does not count."""
        words = list(sys.argv[1:] if args is None else args)
        self._refuse_empty(words)
        found = super().parse_known_args(words, namespace)
        tell_repeated(self._given(words))
        return found

    def _refuse_empty(self, words: Sequence[str]) -> None:
        """Fail where a flag of this parser is followed by nothing but quotes."""
        for word, after in zip(words, [*words[1:], None], strict=False):
            name, equals, value = word.partition("=")
            action = self._option_string_actions.get(name)
            if type(action) is not argparse._StoreAction:
                continue
            if (equals and not value) or (not equals and after == ""):
                rest = "" if action.required else ", or leave it out"
                fail(f"{name} is empty; give it a value{rest}")

    def _given(self, words: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """Each flag of this parser with one value: what it sets, its name, what it is given."""
        for at, word in enumerate(words, 1):
            name, equals, value = word.partition("=")
            action = self._option_string_actions.get(name)
            if type(action) is argparse._StoreAction:
                many = action.nargs if isinstance(action.nargs, int) else 1
                yield action.dest, name, value if equals else " ".join(words[at : at + many])

    def _get_values(self, action: argparse.Action, words: list[str]) -> Any:
        """The value of an argument; fails where a path, say, is empty."""
        if not action.option_strings and "" in words and action.nargs != argparse.PARSER:
            fail(f"{_name(action)} is empty; {self.prog} --help tells what it is")
        return super()._get_values(action, words)

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
        if bare := re.fullmatch(r"argument ([^:]+): ignored explicit argument '(.*)'", message):
            return f"{bare[1].split('/')[-1]} takes no value: leave out ={bare[2]}"
        if two := re.fullmatch(r"argument (\S+): not allowed with argument (\S+)", message):
            return f"{two[1]} and {two[2]} contradict each other: leave one of them out"
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


def tell_repeated(given: Iterable[tuple[str, str, str]]) -> None:
    """Say of what is given several times which value counts, the last.

    given: what is set, the flag that sets it, and its value.
    """
    values: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for what, name, value in given:
        values.setdefault(what, []).append(value)
        names[what] = name
    for what, several in values.items():
        if len(set(several)) > 1:
            say(f"{names[what]} is given {len(several)} times; {several[-1]!r} counts")


def refuse_over(flag: str, out: Path, read: Iterable[Path], beside: bool = True) -> None:
    """Fail where `out`, the value of `flag`, would be written over what a verb reads.

    beside: whether a new file may be written into a folder that is read.
    """
    place = out.resolve()
    for path in read:
        source = path.resolve()
        if place == source:
            fail(f"{out} is what is read, and would be lost; choose another {flag}")
        if source in place.parents and (not beside or place.exists()):
            what = "is a file of" if place.exists() else "would become a part of"
            fail(f"{out} {what} {path}, which is read; choose another {flag}")


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
