"""The checks of the report fire at their limits, one by one; the headline follows from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.report.checks import Check, checks
from fewstep.report.findings import read
from fewstep.report.headline import headline
from fewstep.report.plots import moments, smooth
from fewstep.report.words import compact, duration, short
from tests.end_to_end.report_folder import SICK, invented, student


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A healthy folder to spoil."""
    invented(tmp_path / "run")
    return tmp_path / "run"


def asked(path: Path, spread: float = 0.5) -> list[Check]:
    f = read(path)
    last = f.last["diversity"] if f.last else spread
    return checks(f, {"teacher": spread, "real": spread, "student": min(spread, last)})


@pytest.mark.parametrize("name", SICK)
def test_a_warning_fires_alone(run: Path, name: str) -> None:
    assert [check.warning for check in asked(run) if check.passed is False] == []
    assert len(asked(run)) == 9
    spoil, words = SICK[name]
    spoil(run)
    (warning,) = (check.warning for check in asked(run) if check.passed is False)
    assert words in warning
    f = read(run)
    assert headline(f, asked(run)).mark == "mixed"


@pytest.mark.parametrize(
    ("distance", "mark", "title"),
    [
        (0.74, "good", "It worked: one call instead of 35."),
        (0.76, "mixed", "One call instead of 35, but not yet as good."),
        (1.80, "bad", "It did not work: far from the teacher."),
    ],
)
def test_headlines(run: Path, distance: float, mark: str, title: str) -> None:
    """The teacher has 0.597: 1.24, 1.27 and 3.01 times it."""
    student(fd_digits=distance)(run)
    told = headline(read(run), asked(run))
    assert (told.mark, told.title) == (mark, title)
    assert "on 364 samples" not in told.text
    assert "on 364 samples only" in headline(read(run), [], few=364).text


def test_training_time_counts_every_session(run: Path) -> None:
    """The clock of the log starts anew where a run was continued."""
    lines = [f'{{"step": {i}, "seconds": {s}}}' for i, s in enumerate((5.0, 10.0, 2.0, 4.0))]
    (run / "log.jsonl").write_text("\n".join(lines))
    assert read(run).seconds == 14.0


def test_words() -> None:
    values = (0.59716, 1.2618, 35.0, 12345.6, 2.5e-7, -0.0123, float("nan"), 0.0)
    assert [short(v) for v in values] == [
        *("0.597", "1.26", "35.0", "12,346", "2.50e-7"),
        *("\N{MINUS SIGN}0.0123", "\N{EN DASH}", "0"),
    ]
    assert [compact(v) for v in (0, 0.01, 1500, 12_800, 2e6, 1e-6)] == [
        *("0", "0.01", "1500", "12.8k", "2M", "1e\N{MINUS SIGN}6"),
    ]
    assert [duration(s) for s in (34.4, 125, 12_000)] == ["34 s", "2 min 5 s", "3 h 20 min"]


def test_moments_and_medians() -> None:
    assert moments(3, 6) == [0, 1, 2]
    assert moments(21, 6) == [0, 2, 3, 6, 11, 20]
    assert moments(1) == [0]
    assert moments(0) == []
    assert smooth([1.0, 1.0, 90.0, 1.0, float("nan"), 3.0])[2] == 1.0
