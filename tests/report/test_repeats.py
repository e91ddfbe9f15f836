"""Several seeds of one run: what they share is demanded, and their spread is the textbook's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fewstep.report import plots, tables
from fewstep.report.repeats import seeds, spread, with_repeats
from fewstep.report.run_data import read_run
from tests.report_folder import edit, invented, student


def made(path: Path, seed: int, distance: float) -> Path:
    invented(path)
    edit(path / "run.json", lambda facts: facts["run"].update(seed=seed, save_every=7 + seed))
    student(fd_digits=distance)(path)
    return path


def test_the_spread_between_seeds(tmp_path: Path) -> None:
    paths = [made(tmp_path / f"r{i}", i, distance) for i, distance in enumerate((0.5, 0.7, 1.2))]
    alone = read_run(paths[0])
    assert seeds(alone) == "one seed"
    found = spread(alone, "fd_digits")
    assert (found.mean, found.n, math.isnan(found.deviation)) == (0.5, 1, True)
    f = with_repeats(alone, paths[1:])
    assert seeds(f) == "seeds 0, 1 and 2"
    found = spread(f, "fd_digits")
    assert found.mean == pytest.approx(0.8)
    assert found.deviation == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2))
    assert tables.roles(f) == ["real", "teacher", "student", "seeds"]
    row = next(row for row in tables.metrics(f) if row.name == "fd_digits")
    assert (row.cells[3].text, row.cells[3].spread) == ("0.800", "± 0.36, n = 3")
    assert [len(row.cells) for row in tables.metrics(alone)][:1] == [3]
    chart = plots.quality(f)[0].svg
    assert ">seeds 0, 1 and 2<" in chart
    assert ">other seeds<" in chart
    chart = plots.quality(alone)[0].svg
    assert ">one seed<" in chart
    assert ">other seeds<" not in chart


def test_what_is_no_repeat(tmp_path: Path) -> None:
    one, two = made(tmp_path / "a", 0, 0.5), made(tmp_path / "b", 1, 0.5)
    same = made(tmp_path / "c", 1, 0.5)
    with pytest.raises(ValueError, match=r"c has the seed 1, as .*b has"):
        with_repeats(read_run(one), [two, same])
    edit(two / "run.json", lambda facts: facts["run"].update(batch=17))
    with pytest.raises(ValueError, match=r"b is no repeat of .*a: its run.batch is 17, not 256; "):
        with_repeats(read_run(one), [two])
    with pytest.raises(ValueError, match="nothing"):
        with_repeats(read_run(one), [tmp_path / "nothing"])
