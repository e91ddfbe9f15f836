"""The served page of a run: what it shows, that it is renewed, and that it only reads."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fewstep.data.image_grid import png
from fewstep.report.run_data import RunData
from fewstep.storage.files import Damaged
from fewstep.web.watch import LOW, Watch, watch
from tests.asgi import request
from tests.report_folder import invented

PICTURE = png(Image.new("L", (2, 3)))


def contents(path: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_run_is_read_and_renewed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    invented(run)
    (run / "grids").mkdir()
    (run / "grids/step-00000007.png").write_bytes(PICTURE)
    before = contents(run)
    watched = watch(run)
    app = watched.application()
    page = request(app)
    assert page.status == 200
    assert b'data-uri="/grid/7.png"' in page.body
    assert b"style=" not in page.body  # the policy of the server forbids it
    state = json.loads(request(app, "/state").body)
    assert (state["share"], state["finished"]) == (1.0, True)
    assert request(app, "/grid/7.png").body == PICTURE
    assert request(app, "/grid/8.png").status == 404
    assert request(app, "/grid/..%2f7.png").status == 404
    assert request(app, "/page.js").header("content-type") == "text/javascript; charset=utf-8"
    assert contents(run) == before
    (run / "gauges.jsonl").write_text("")
    assert json.loads(request(app, "/state").body)["version"] == state["version"]  # not so often
    assert renewed(watched)["version"] != state["version"]
    (run / "run.json").write_text("{")
    assert "run.json" in renewed(watched)["error"]
    assert request(app).status == 503
    broken = request(app, "/state")
    assert broken.status == 503
    assert "run.json" in json.loads(broken.body)["error"]


def renewed(watched: Watch) -> Any:
    """The state, after the drawing that is due."""
    app = watched.application()
    watched.again = 0.0
    request(app, "/state")
    watched.drawing.join()
    return json.loads(request(app, "/state").body)


def test_the_last_page_is_the_answer_while_the_next_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread of low priority; a drawing that fails is told, and tried again."""
    run = tmp_path / "run"
    invented(run)
    watched = watch(run)
    first, goes, priorities = watched.newest(), threading.Event(), []

    def slow(f: RunData, _: None) -> str:
        goes.wait(30)
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        if not f.gauges:
            raise ValueError("no look")
        return "the next"

    monkeypatch.setattr("fewstep.web.watch.render", slow)
    gauges = (run / "gauges.jsonl").read_text()
    (run / "gauges.jsonl").write_text("")
    watched.again = 0.0
    assert watched.newest() == watched.newest() == first
    goes.set()
    watched.drawing.join()
    with pytest.raises(ValueError, match="no look"):
        watched.newest()
    (run / "gauges.jsonl").write_text(gauges + "\n" + gauges)
    watched.again = 0.0
    with pytest.raises(ValueError, match="no look"):
        watched.newest()
    watched.drawing.join()
    assert watched.newest()[0] == "the next"
    if sys.platform == "linux":
        assert priorities == [LOW, LOW]
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < LOW


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises((Damaged, ValueError), match="nothing"):
        watch(tmp_path / "nothing")
