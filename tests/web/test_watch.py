"""The served page of a run: what it shows, that it is renewed, and that it only reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fewstep.data.image_grid import png
from fewstep.storage.files import Damaged
from fewstep.web.watch import watch
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
    watched.again = 0.0
    renewed = json.loads(request(app, "/state").body)
    assert renewed["version"] != state["version"]
    (run / "run.json").write_text("{")
    watched.again = 0.0
    broken = request(app, "/state")
    assert broken.status == 503
    assert "run.json" in json.loads(broken.body)["error"]


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises((Damaged, ValueError), match="nothing"):
        watch(tmp_path / "nothing")
