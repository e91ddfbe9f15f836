"""Runs side by side: groups, intervals and refusals, on folders written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.compare.table import Comparison, compare, interval
from tests.report_folder import edit, invented


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, seed: int = 0, score: float = 0.7, alpha: float = 1.0) -> Path:
        path = tmp_path / name
        invented(path)

        def change(facts: dict) -> None:  # type: ignore[type-arg]
            facts["run"]["seed"] = seed
            facts["run"]["method"]["alpha"] = alpha

        edit(path / "run.json", change)
        edit(path / "metrics.json", lambda m: m["student"].update(fd_digits=score))
        return path

    return make


def three_seeds(made: Callable[..., Path]) -> Comparison:
    paths = [made(f"a-{s}", s, x) for s, x in enumerate((1.0, 1.2, 1.4))]
    paths += [made(f"b-{s}", s, x, alpha=1.2) for s, x in enumerate((0.9, 1.0, 1.3))]
    return compare(paths)


def test_an_interval_is_students() -> None:
    """By hand: mean 1.2, standard error .2 / sqrt 3, t of two degrees 4.3027."""
    found = interval([1.0, 1.2, 1.4])
    assert found.mean == pytest.approx(1.2)
    assert found.high - found.mean == pytest.approx(4.302653 * 0.2 / math.sqrt(3), rel=1e-6)
    assert interval([1.0, math.nan]).n == 1
    assert math.isnan(interval([1.0]).low)
    assert math.isnan(interval([]).mean)


def test_runs_that_differ_in_the_seed_alone_are_one_setting(made: Callable[..., Path]) -> None:
    found = three_seeds(made)
    assert [group.name for group in found.groups] == ["a", "b"]
    assert [entry.seed for entry in found.groups[1].entries] == [0, 1, 2]
    assert found.groups[0].score("fd_digits").mean == pytest.approx(1.2)
    assert found.differing() == [("method.alpha", ["1.0", "1.2"])]


def test_settings_are_compared_seed_by_seed(made: Callable[..., Path]) -> None:
    """Differences -.1, -.2, -.1: clear, where the intervals of the means overlap."""
    (found,) = three_seeds(made).differences()
    assert found.of.mean == pytest.approx(-0.4 / 3)
    assert found.of.high == pytest.approx(-0.4 / 3 + 4.302653 * (0.1 / 3), rel=1e-3)
    assert not found.clear
    assert found.of.n == 3


def test_without_common_seeds_nothing_is_compared(made: Callable[..., Path]) -> None:
    paths = [made("a-0", 0), made("a-1", 1), made("b-2", 2, alpha=1.2), made("b-3", 3, alpha=1.2)]
    assert compare(paths).differences() == []


def test_json_has_every_run_and_no_nan(made: Callable[..., Path]) -> None:
    found = three_seeds(made)
    stored = json.loads(json.dumps(found.json(), allow_nan=False))
    assert [run["seed"] for run in stored["runs"]] == [0, 1, 2, 0, 1, 2]
    assert stored["runs"][3]["scores"]["fd_digits"] == 0.9
    assert stored["runs"][0]["quick"]["fd_digits"] == 6.0
    assert stored["teacher"]["calls"] == 35
    assert stored["groups"][0]["scores"]["fd_digits"]["n"] == 3
    assert stored["settings"] == {"method.alpha": {"a": "1.0", "b": "1.2"}}
    step = stored["runs"][0]["forwards_a_step"]
    assert stored["runs"][0]["forwards"] == pytest.approx(20 * step)


def test_what_a_reader_should_know_is_said(made: Callable[..., Path]) -> None:
    one, two = made("one"), made("two", alpha=1.2)
    edit(one / "metrics.json", lambda m: m["protocol"].update(samples=500))
    edit(two / "run.json", lambda f: f.update(digests={"teacher": {"weights": "x"}}))
    three = made("three", alpha=0.9)
    (three / "metrics.json").unlink()
    notes = " ".join(compare([one, two, three]).notes)
    for words in (
        "Not measured yet: three; 'fewstep evaluate RUN' does it.",
        "different numbers of samples",
        "They have different teachers.",
        "One seed each",
    ):
        assert words in notes


def test_time_that_a_stopped_run_lost_is_not_counted(made: Callable[..., Path]) -> None:
    path = made("one")
    lines = [{"step": s, "seconds": t} for s, t in ((1, 2.0), (2, 3.0), (3, 1.0), (4, 2.5))]
    (path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (entry,) = compare([path]).entries
    assert entry.clock == {0.0: 0.0, 1.0: 2.0, 2.0: 3.0, 3.0: 4.0, 4.0: 5.5}


def test_a_damaged_method_costs_nothing_that_is_known(made: Callable[..., Path]) -> None:
    path = made("one")
    edit(path / "run.json", lambda f: f["run"]["method"].update(type="Gone"))
    found = compare([path])
    assert found.entries[0].json()["forwards"] is None
    assert "one: its cost is not known" in found.notes[0]


def test_other_data_and_runs_named_twice_are_refused(made: Callable[..., Path]) -> None:
    one, two = made("one"), made("two")
    with pytest.raises(ValueError, match="is named twice; name each run once"):
        compare([one, two, one])
    edit(two / "run.json", lambda f: f["run"].update(domain={"type": "MNIST"}))
    with pytest.raises(ValueError, match=r"one is of Digits, two of MNIST: their scores are of"):
        compare([one, two])
    with pytest.raises(ValueError, match=r"run\.json"):
        compare([one.parent])
