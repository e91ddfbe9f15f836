"""The page of a comparison: what it says is what the table holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.compare.page import charts, columns, pictures, render, rows
from fewstep.compare.table import compare
from fewstep.report.sample_images import UNASKED
from tests.compare.test_table import made, three_seeds
from tests.report_folder import edit

__all__ = ["made"]


def test_a_row_a_setting_after_the_teachers(made: Callable[..., Path]) -> None:
    c = three_seeds(made)
    assert columns(c)[:3] == ["calls", "fd_digits", "precision"]
    teacher, a, b = rows(c)
    assert (teacher.name, teacher.cells[:2]) == ("teacher", [("35", ""), ("0.597", "")])
    assert (a.seeds, a.best, b.best) == ("0, 1, 2", False, True)
    assert a.cells[1] == ("1.20", "0.703 to 1.70")


def test_the_best_is_marked_by_the_metrics_own_sense(made: Callable[..., Path]) -> None:
    """Alone nothing is the best; a score that is missing is not."""
    one, two = made("one", score=0.9), made("two", score=0.8, alpha=1.2)
    assert [row.best for row in rows(compare([one]))] == [False, False]
    assert [row.best for row in rows(compare([one, two]))] == [False, False, True]
    (two / "metrics.json").unlink()
    assert [row.best for row in rows(compare([one, two]))] == [False, False, False]


def test_charts_are_against_images_passes_and_seconds(made: Callable[..., Path]) -> None:
    c = three_seeds(made)
    titles = [one.title for one in charts(c)]
    assert titles == [
        "fd_digits against images",
        "fd_digits against forward passes",
        "Diversity",  # seconds were not logged
    ]
    assert "6 at 240" in charts(c)[0].svg or "aria-label" in charts(c)[0].svg


def test_what_a_folder_says_is_escaped(made: Callable[..., Path]) -> None:
    one, two = made("<b>one"), made("two", alpha=1.2)
    edit(two / "run.json", lambda f: f["run"]["method"].update(type="<script>"))
    page = render(compare([one, two]), UNASKED)
    assert "<script>" not in page
    assert "<b>one" not in page
    assert "&lt;script&gt;" in page


def test_models_that_are_not_there_are_named(made: Callable[..., Path]) -> None:
    shown = pictures(compare([made("one")]), UNASKED)
    assert shown.pictures == []
    assert shown.notes[0].startswith("one is not shown: ")
    with pytest.raises(ValueError, match="device"):
        type(UNASKED)("nowhere")
