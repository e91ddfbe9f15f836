"""The checks of the report fire at their limits, one by one; the headline follows from them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fewstep.report import svg_chart
from fewstep.report.checks import LEARNING, Check, checks, informed
from fewstep.report.formatting import compact, duration, short
from fewstep.report.headline import headline
from fewstep.report.plots import moments, smooth
from fewstep.report.run_data import read_run
from fewstep.report.svg_chart import Axis, Chart, Series, chart
from tests.report_folder import SICK, invented, student


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A healthy folder to spoil."""
    invented(tmp_path / "run")
    return tmp_path / "run"


def asked(path: Path, spread: float = 0.5) -> list[Check]:
    f = read_run(path)
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
    f = read_run(run)
    assert headline(f, asked(run)).mark == "mixed"


def learnt(path: Path, shares: Sequence[float], fisher: Sequence[float]) -> None:
    """Looks at which the fake score has gone those shares of its way to the student."""
    lines = []
    for i, (p, value) in enumerate(zip(shares, fisher, strict=True)):
        levels = []
        for t in (0.1, 1.0, 10.0):  # on the path of digits: alpha = 1, sigma = t
            gap = value * t**4
            gain = gap * (2 - p) / p if p else 0.0
            entry = {"t": t, "fisher": value, "teacher_error": 1e6, "fake_error": 1e6 - gain}
            levels.append(entry)
        lines.append(json.dumps({"step": 5 * i, "images": 80 * i, "levels": levels}))
    (path / "gauges.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("shares", "fisher", "count", "ratio", "passed"),
    [
        ((0.0, 0.02, 0.05, 0.1, 0.2, 0.3), (0.0, 1e-3, 2e-3, 8e-3, 2e-2, 0.03), 0, None, None),
        ((0.0, 0.1, 0.4, 0.52, 0.9), (0.0, 0.01, 0.2, 0.3, 0.8), 2, None, None),
        ((0.0, 0.1, 0.4, 0.52, 0.9, 1.0), (0.0, 0.01, 0.2, 0.5, 0.4, 0.5), 3, 1.25, None),
        ((0.0, 0.1, 0.9, 1.0, 1.0), (0.0, 0.01, 0.5, 0.4, 0.8), 3, 2.0, False),
        ((0.9, 0.9, 1.0), (0.5, 0.4, 0.2), 3, 0.5, True),
    ],
)
def test_the_fisher_check_waits_for_the_fake_score(
    run: Path,
    shares: Sequence[float],
    fisher: Sequence[float],
    count: int,
    ratio: float | None,
    passed: bool | None,
) -> None:
    """An estimate that rises from nothing while the fake score learns is no lowest."""
    learnt(run, shares, fisher)
    assert len(informed(read_run(run))) == count
    check, keeps = (
        next(c for c in checks(read_run(run), {}) if c.name == name)
        for name in ("Fisher divergence falls", "Fake score keeps up")
    )
    assert keeps.passed is (True if shares[-1] >= 0.5 else None)
    assert ("too early to say" in keeps.value) is (shares[-1] < 0.5)
    assert check.passed is passed
    if ratio is None:
        assert check.value.startswith(f"too few looks to say: {count} of {len(shares)} count")
    else:
        assert f"; {short(ratio)} times its lowest before" in check.value


def factored(path: Path, looks: Sequence[Sequence[float]]) -> Check:
    """The Fisher check where the fake score is well informed at every look."""
    lines = []
    for i, values in enumerate(looks):
        levels = []
        for place, value in enumerate(values):
            t = 10.0 ** (place - 4)
            gain = value * t**4
            entry = {"t": t, "fisher": value, "teacher_error": 1e9, "fake_error": 1e9 - gain}
            levels.append(entry)
        lines.append(json.dumps({"step": 5 * i, "images": 80 * i, "levels": levels}))
    (path / "gauges.jsonl").write_text("\n".join(lines))
    return next(c for c in checks(read_run(path), {}) if c.name == "Fisher divergence falls")


@pytest.mark.parametrize(
    ("course", "rising", "passed"),
    [
        ((9.0, 5.0, 3.0, 2.0, 1.5, 1.2), 0, True),
        ((9.0, 5.0, 3.0, 3.2, 3.3, 3.4), 9, None),  # a little, but everywhere
        ((9.0, 5.0, 3.0, 3.2, 3.6, 4.2), 9, False),  # 1.4 times its lowest
        ((9.0, 5.0, 3.0, 3.0, 3.0, 3.0), 0, None),
        ((3.0, 3.0, 3.0, 5.0, 4.9, 4.8), 0, False),  # far above its lowest
        ((1.0, 1.03, 1.06, 1.09, 1.12, 1.15), 9, None),
        ((1.0, 1.1, 1.2, 1.3, 1.4, 1.49), 9, False),
    ],
)
@pytest.mark.parametrize("level", [1e-3, 1.0, 1e3])
def test_what_rises_is_not_said_to_fall(
    run: Path, course: Sequence[float], rising: int, passed: bool | None, level: float
) -> None:
    """Nine levels that move together; the verdict is of the last looks, in any units."""
    check = factored(run, [[level * value / (i + 1) for i in range(9)] for value in course])
    assert f"rising at {rising} of 9 levels" in check.value
    assert check.passed is passed


def test_levels_that_disagree_are_counted(run: Path) -> None:
    """Most fall: it falls; most rise clearly but not nearly all: nothing is said."""
    down, up = (1.0, 0.9, 0.8, 0.7), (1.0, 1.1, 1.2, 1.3)
    for falling, passed in ((5, True), (3, None), (1, False)):
        courses = [down] * falling + [up] * (9 - falling)
        check = factored(run, list(zip(*courses, strict=True)))
        assert f"rising at {9 - falling} of 9 levels" in check.value
        assert check.passed is passed


def test_half_the_way_in_closed_form() -> None:
    """Gain over gap of a fake score between the teacher and the best answer, by sampling."""
    rng = np.random.default_rng(0)
    noisy = rng.normal(size=400_000)
    x = 0.7 * noisy + 0.5 * rng.normal(size=noisy.size)  # E[x | xt] = 0.7 xt
    teacher = 1.3 * noisy
    for p in (0.2, 0.5, 0.8, 1.0):
        fake = teacher + p * (0.7 * noisy - teacher)
        gain = ((teacher - x) ** 2 - (fake - x) ** 2).mean()
        gap = ((teacher - fake) ** 2).mean()
        assert gain / gap == pytest.approx((2 - p) / p, abs=0.05)  # four standard errors
    assert LEARNING == (2 - 0.5) / 0.5


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
    told = headline(read_run(run), asked(run))
    assert (told.mark, told.title) == (mark, title)
    assert "on 364 samples" not in told.text
    assert "on 364 samples only" in headline(read_run(run), [], few=364).text
    student(fd_digits_of_364=1.3141)(run)
    beside = "score 1.26 (on 364 samples; as few of the student's score 1.31)."
    assert beside in headline(read_run(run), [], few=364).text


def test_training_time_counts_every_session(run: Path) -> None:
    """The clock of the log starts anew where a run was continued."""
    lines = [f'{{"step": {i}, "seconds": {s}}}' for i, s in enumerate((5.0, 10.0, 2.0, 4.0))]
    (run / "log.jsonl").write_text("\n".join(lines))
    assert read_run(run).seconds == 14.0


def test_words() -> None:
    values = (0.59716, 1.2618, 35.0, 12345.6, 2.5e-7, -0.0123, float("nan"), 0.0)
    assert [short(v) for v in values] == [
        *("0.597", "1.26", "35.0", "12,346", "2.50e-7"),
        *("\N{MINUS SIGN}0.0123", "\N{EN DASH}", "0"),
    ]
    assert [compact(v) for v in (0, 0.01, 1500, 12_800, 2e6, 1e-6, -0.00025, 3e-5, 2e-12)] == [
        *(
            "0",
            "0.01",
            "1500",
            "12.8k",
            "2M",
            "10⁻⁶",
            "\N{MINUS SIGN}0.00025",
            "0.00003",
            "2·10⁻¹²",
        ),
    ]
    assert [duration(s) for s in (34.4, 125, 12_000)] == ["34 s", "2 min 5 s", "3 h 20 min"]


def test_a_constant_has_one_tick() -> None:
    """Five ticks around 1e-6 would all be labelled 1e-6; what varies keeps its own."""

    def ticks(values: Sequence[float]) -> list[str]:
        drawn = chart("k", "Rates", [Series([10.0, 20.0], values)], Axis("step"), Axis("rate"))
        assert drawn is not None
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn.svg)
        return texts[texts.index("step") + 1 : texts.index("rate")]

    assert ticks([1e-6, 1e-6]) == ["10⁻⁶"]
    assert ticks([0.0, 0.0]) == ["0"]
    several = [float(text.replace("\N{MINUS SIGN}", "-")) for text in ticks([1.0, 2.0])]
    assert len(several) > 3
    assert several == sorted(set(several))


def test_a_chart_is_drawn_again_only_where_its_data_are_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[str] = []
    inside = svg_chart._inline
    monkeypatch.setattr(
        svg_chart, "_inline", lambda svg, key, words: drawn.append(key) or inside(svg, key, words)
    )

    def of(values: Sequence[float], key: str = "again") -> Chart | None:
        return chart(key, "A", [Series([1.0, 2.0], values)], Axis("x"), Axis("y"))

    first = of([3.0, 4.0])
    assert of([3.0, 4.0]) is first
    assert of([3.0, 5.0]) != first
    assert of([3.0, 4.0]) == first
    assert of([3.0, 4.0], "other") != first  # its ids are others
    assert drawn == ["again", "again", "again", "other"]


def test_moments_and_medians() -> None:
    assert moments(3, 6) == [0, 1, 2]
    assert moments(21, 6) == [0, 2, 3, 6, 11, 20]
    assert moments(1) == [0]
    assert moments(0) == []
    assert smooth([1.0, 1.0, 90.0, 1.0, float("nan"), 3.0])[2] == 1.0
