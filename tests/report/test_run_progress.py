"""The state of a run in words, and the time left at the pace of its last lines."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

from fewstep.report.run_data import last_lines, read_run, read_state
from fewstep.report.run_progress import left, progress
from tests.report_folder import invented


def logged(path: Path, *lines: tuple[int, float]) -> None:
    text = "".join(json.dumps({"step": s, "images": s, "seconds": t}) + "\n" for s, t in lines)
    (path / "log.jsonl").write_text(text)


def test_the_pace_counts_from_where_the_clock_began_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    invented(run)
    assert progress(read_run(run)).text == "Finished: 20 steps."
    shutil.rmtree(run / "student")
    logged(run, (100, 50.0), (200, 1.0), (300, 21.0))
    f = read_run(run)
    assert left(f) == (f.steps - 300) * 0.2 == 300.0
    assert progress(f).share == 300 / 1800
    assert progress(f).text == "Step 300 of 1,800 (17%), about 5 min 0 s left."
    os.utime(run / "log.jsonl", (0, time.time() - 190))
    assert "nothing new" not in progress(f).text  # a line takes 20 s
    os.utime(run / "log.jsonl", (0, time.time() - 240))
    assert progress(f).text.endswith("nothing new for 4 min 0 s: it may have stopped.")
    logged(run, (300, 21.0))
    assert progress(read_run(run)).text == "Step 300 of 1,800 (17%)."


def test_the_state_is_told_by_the_last_lines_alone(tmp_path: Path) -> None:
    """As by the whole log, of which only the end is read; torn and damaged lines are left out."""
    run = tmp_path / "run"
    invented(run)
    shutil.rmtree(run / "student")
    logged(run, *((step, step / 10) for step in range(1, 1501)))
    whole, state = read_run(run), read_state(run)
    assert 0 < len(state.log) <= len(whole.log)
    assert progress(state) == progress(whole)
    path = run / "log.jsonl"
    assert last_lines(path, 150) == whole.log[-3:]
    (run / "log.jsonl").write_text(path.read_text() + 'damaged\n[1]\n{"step": 1600, "seco')
    assert last_lines(path, 200) == whole.log[-3:]
    assert read_state(run).done == 1500
    path.unlink()
    assert (last_lines(path), read_state(run).done) == ([], 0)
