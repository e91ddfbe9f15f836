"""Every field of a configuration class has a meaning, and `--help` shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, fields
from io import StringIO
from typing import Any

import tyro
from tyro._docstrings import get_field_docstring

from fewstep import config
from tests.command import fewstep


@dataclass(frozen=True)
class Planted:
    """A class that says of some fields what they are.

    Attributes:
        scale: how large samples are.
    """

    scale: float = 1.0
    steps: int = 3
    """Number of network calls."""
    lam: float = 2.0
    """lambda."""
    silent: int = 4


def meaning(cls: type, name: str) -> str:
    """What tyro says of a field, as one line."""
    return " ".join((get_field_docstring(cls, name, ()) or "").split())


def without_sentence(classes: Mapping[str, type]) -> list[str]:
    """Fields whose meaning is no sentence: none at all, one word, or without a full stop."""
    return [
        f"{cls.__name__}.{field.name}"
        for cls in classes.values()
        for field in fields(cls)
        if field.init and not re.fullmatch(r"\S+ .*\.", meaning(cls, field.name))
    ]


def shown(cls: type[Any]) -> str:
    """The help of a class, as one line."""
    out = StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        tyro.cli(cls, args=["--help"])
    return " ".join(re.sub("[│╭╮╰╯─]", " ", out.getvalue()).split())


def test_every_field_of_a_configuration_has_a_meaning() -> None:
    classes = config.known()
    assert sum(field.init for cls in classes.values() for field in fields(cls)) > 800
    assert without_sentence(classes) == []


def test_fields_without_one_are_seen() -> None:
    """What is looked up is what the help shows."""
    assert without_sentence({"Planted": Planted}) == ["Planted.lam", "Planted.silent"]
    text = shown(Planted)
    assert "--scale FLOAT how large samples are. (default: 1.0)" in text
    assert "--steps INT Number of network calls. (default: 3)" in text
    assert "--lam FLOAT lambda. (default: 2.0)" in text
    assert "--silent INT (default: 4)" in text


def test_help_is_that_of_the_run_as_it_is_flagged() -> None:
    """The fields of the method given, each meaning one paragraph, whole numbers in one piece."""
    found = fewstep("distill", "digits", "--method", "SCM()", "--steps", "7", "--help")
    assert (found.code, found.err) == (0, "")
    assert "--method.warmup INT      Steps in which r goes from 0 to 1" in found.out
    assert "--method.alpha" not in found.out
    assert "Training steps. (default: 7)" in found.out
    assert "(published:\n                           10,000). (default: 200)" in found.out
    assert "\n\n method options\n" in found.out
    paragraphs = re.findall(r"\n((?: {27}\S.*\n)+)", found.out)
    ends = [line for text in paragraphs for line in text.splitlines()[:-1] if len(line) < 50]
    assert ends == []  # no line ends early because one of the source did
    assert fewstep("distill", "digits", "--code", __file__, "--help").code == 0  # of a teacher
    refused = fewstep("distill", "digits", "--method", "SCN()", "--help")
    assert (refused.code, refused.out) == (2, "")
    assert "there is no 'SCN'; did you mean 'SCM'?" in refused.err
