"""Flags given twice, empty or with a value too many, and outputs over what is read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fewstep.cli import output
from fewstep.cli.parser import Parser, refuse_over, require_finite, verb_parser
from fewstep.cli.run_flags import resolve
from fewstep.methods.sid import SiD
from fewstep.recipes.digits import digits


@pytest.fixture
def parser() -> Parser:
    output.begin()
    made = verb_parser("verb", "For a test.")
    made.add_argument("model", type=Path)
    made.add_argument("--seeds", default="0")
    made.add_argument("--draws", "--runs", type=int, dest="draws")
    made.add_argument("--between", nargs=2, type=float)
    made.add_argument("--code", action="append", default=[])
    made.add_argument("--open", action="store_true")
    return made


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--seeds 1 m --seeds=2", "--seeds is given 2 times; '2' counts"),
        ("m --draws 3 --runs 4 --draws 5", "--draws is given 3 times; '5' counts"),
        ("m --between 1 2 --between 1 3", "--between is given 2 times; '1 3' counts"),
        ("m --seeds 1 --seeds 1", ""),
        ("m --code a --code b --open --open", ""),
        ("m --seeds 1 --seeds 2 --quiet", ""),
    ],
)
def test_of_a_flag_given_twice_the_last_counts_which_is_told(
    parser: Parser, capsys: pytest.CaptureFixture[str], words: str, told: str
) -> None:
    flags = parser.parse_args(words.split())
    assert capsys.readouterr() == ("", f"{told}\n" if told else "")
    assert flags.model == Path("m")
    assert flags.seeds == {"--seeds 1 m --seeds=2": "2"}.get(words, flags.seeds)


def test_fields_of_a_run_given_twice_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Scalars and whole parts; the last counts."""
    output.begin()
    args = "--steps 3 --save-every 4 --steps=5 --method SIM() --save_every 6 --method SiD(alpha=1)"
    run = resolve(digits(), args.split(), "fewstep distill digits")
    assert (run.steps, run.save_every) == (5, 6)
    assert isinstance(run.method, SiD)
    assert run.method.alpha == 1
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "--method is given 2 times; 'SiD(alpha=1)' counts",
        "--save_every is given 2 times; '6' counts",
        "--steps is given 2 times; '5' counts",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["m", "--seeds", ""], "--seeds is empty; give it a value, or leave it out"),
        (["m", "--seeds="], "--seeds is empty; give it a value, or leave it out"),
        ([""], "model is empty; fewstep verb --help tells what it is"),
        (["m", "--open=yes"], "--open takes no value: leave out =yes"),
    ],
)
def test_empty_values_and_values_too_many_are_refused(
    parser: Parser, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"fewstep: {told}\n")


def test_what_is_read_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By whatever path it is named, through a link as well; new files beside it are allowed."""
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    Path("set/a.png").touch()
    Path("link").symlink_to("set")
    read = [Path("set")]
    refuse_over("--out", Path("b.png"), read, beside=False)
    refuse_over("--out", Path("set/b.png"), read)
    for out, beside in (("link/a.png", True), ("link/b.png", False), ("link", True)):
        with pytest.raises(SystemExit):
            refuse_over("--out", Path(out), read, beside)
    assert capsys.readouterr().err.splitlines() == [
        "fewstep: link/a.png is a file of set, which is read; choose another --out",
        "fewstep: link/b.png would become a part of set, which is read; choose another --out",
        "fewstep: link is what is read, and would be lost; choose another --out",
    ]


def test_scales_are_finite() -> None:
    for scale in (-2.0, 0.0, 1e300):
        require_finite("--guidance", scale)
    for scale in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"^--tune-scale is a finite scale, got {scale}$"):
            require_finite("--tune-scale", scale)
