"""The report: what it says is what the files say, and it says so when something is wrong.

One tiny distillation of the digits, with an untrained teacher, is made once; every test works on
a copy of its folder, with measurements and gauges written by hand.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.data import digits as data
from fewstep.data.image_grid import grid, png
from fewstep.diffusion.samplers import Heun
from fewstep.methods.pretrain import Pretrain
from fewstep.recipes.digits import MODEL, digits, digits_teacher
from fewstep.report.checks import checks
from fewstep.report.headline import headline
from fewstep.report.page import write_report
from fewstep.report.run_data import read_run
from fewstep.runs.runner import execute
from fewstep.storage.files import Damaged, read_json, write_json
from fewstep.storage.model_folder import load_student, save_student
from tests.report_folder import CALLS, SCORES, SICK, STEPS, edit, healthy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and its teacher, as the runner leaves them."""
    out = tmp_path_factory.mktemp("runs")
    method = Pretrain(sampler=Heun(steps=2))
    save_student(out / "teacher" / "student", MODEL.build(1), MODEL, method, {"seed": 1})
    run = replace(digits(), steps=STEPS, batch=16, sample_every=20)
    steps = execute(
        run, out / "run", recipe="digits", teacher=str(out / "teacher"), command="fewstep x"
    )
    assert len(list(steps)) == STEPS
    assert len(list((out / "run" / "grids").iterdir())) == 2
    return out / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    copy = Path(shutil.copytree(made, tmp_path / "run"))
    healthy(copy)
    return copy


class Page(HTMLParser):
    """What a browser would see: tags, ids, pictures, text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, text: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.text += text

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def picture(self, alt: str) -> bytes:
        """The file of the one picture whose description begins with `alt`."""
        (uri,) = (str(i["src"]) for i in self.all("img") if str(i["alt"]).startswith(alt))
        return base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)


def page(path: Path) -> Page:
    assert write_report(path) == path / "report.html"
    return Page(path / "report.html")


def test_a_healthy_run(run: Path) -> None:
    """Headline, numbers, pictures and settings of one page, and that it stands alone."""
    p = page(run)
    assert "It worked: one call instead of 35." in p.text
    assert "fd_digits 0.671 against the teacher's 0.597 (1.1 times)" in p.text
    assert "real held-out data score 1.26 (on 364 samples only" in p.text
    assert "warning" not in p.text
    assert "3 draws of 5,000 fresh samples" in p.text
    assert "1,433 training samples" in p.text
    stands_alone(p)
    holds_the_measurements(p, read_json(run / "metrics.json"))
    shows_the_pictures(p, run)
    lists_settings_and_digests(p, run)
    first = (run / "report.html").read_bytes()
    assert write_report(run).read_bytes() == first


def stands_alone(p: Page) -> None:
    names = {tag for tag, _ in p.tags}
    assert not names & {"link", "iframe", "object", "embed", "form", "base"}
    assert "http:" not in p.source
    assert "https:" not in p.source
    assert "@import" not in p.source
    script = re.findall(r"<script>(.*?)</script>", p.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert (len(script), p.all("script")) == (1, [{}])
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    policy += f"script-src 'sha256-{digest}'"
    assert policy in {m.get("content") for m in p.all("meta")}
    ids = [attrs["id"] for _, attrs in p.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:url\(|href=")([^)"]*)', p.source)
    files = [t for t in targets if t.startswith(("data:text/csv", "data:application/json"))]
    assert len(files) == 2
    assert all(t in files or (t[0] == "#" and t[1:] in ids) for t in targets)
    assert len(p.all("svg")) == 3 + 4 + 4  # quality, gauges, training
    assert all(svg.get("aria-label") and svg.get("role") == "img" for svg in p.all("svg"))


def holds_the_measurements(p: Page, stored: dict[str, Any]) -> None:
    table = p.source[p.source.index('id="metrics"') :]
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>(.*?)</tr>', table, re.DOTALL)
    found = {
        name: [float(x) for x in re.findall(r'<data value="([^"]+)">', r)] for name, r in rows
    }
    for name in ("fd_digits", "precision", "recall", "accuracy", "nn"):
        assert found[name] == [stored[role][name] for role in ("real", "teacher", "student")]
    labels = re.findall(r'data-of="(\w+)"', rows[0][1])  # what a phone shows above each number
    assert labels == ["real", "teacher", "student"]
    for name in ("calls", "ms_per_image"):
        assert found[name] == [stored[role][name] for role in ("teacher", "student")]
    assert next(iter(found)) == "fd_digits"
    assert re.search(r">0\.597</data><small>± 0\.031</small>", table)


def shows_the_pictures(p: Page, run: Path) -> None:
    for image in p.all("img"):
        assert str(image["src"]).startswith("data:image/png;base64,")
        assert image["alt"]
        size = Image.open(io.BytesIO(p.picture(str(image["alt"])))).size
        assert size == (int(str(image["width"])), int(str(image["height"])))
    for role, folder in (
        ("Student", run),
        ("Teacher", Path(read_json(run / "run.json")["teacher"])),
    ):
        assert p.picture(role) == png(grid(load_student(folder).sample(range(100)), columns=10))
    _, held_out = data.load_digits()
    threes = held_out.x0[held_out.labels == 3][:10]
    shown = np.asarray(Image.open(io.BytesIO(p.picture("Real"))))
    column = np.asarray(grid(threes, columns=1))
    assert shown.shape == (524, 524)
    assert (shown[:, 3 * 52 : 3 * 52 + column.shape[1]] == column).all()
    look = np.asarray(Image.open(run / "grids" / "step-00000020.png"))
    strip = np.asarray(
        Image.open(io.BytesIO(p.picture("Samples of the same noise after step 20")))
    )
    assert strip.shape == (56, 2 * 520 + 4)
    assert (strip[:, :520] == look[:56, :520]).all()
    assert (strip[:, 520:] == look[52:108]).all()


def lists_settings_and_digests(p: Page, run: Path) -> None:
    facts = read_json(run / "run.json")
    settings = p.source[p.source.index('id="settings"') :]
    rows = re.findall(
        r'title="--([\w.]+)">\w+</th><td><code>(.*?)</code></td><td>(.*?)</td>', settings
    )
    values = {flag: (value, other) for flag, value, other in rows}
    assert values["method.fake.times.mean"] == (str(digits().method.fake.times.mean), "")  # type: ignore[attr-defined]
    assert values["steps"] == ("20", f"<code>{digits().steps}</code>")
    assert values["batch"] == ("16", f"<code>{digits().batch}</code>")
    assert len(values) == settings.count("<tr ")
    shown = settings[settings.index("<summary>Everything") :]
    text = re.sub(r"&#34;", '"', re.findall(r"<code>(.*?)</code>", shown, re.DOTALL)[0])
    assert json.loads(text.replace("&#39;", "'")) == facts
    for name, digest in read_json(run / "student" / "manifest.json")["sha256"].items():
        assert f"student/{name}" in p.text
        assert digest in p.text


def test_what_comes_from_files_is_escaped(run: Path) -> None:
    evil = "<script>alert(1)</script>"

    def poison(facts: Any) -> None:
        facts["command"] = f"fewstep {evil}"
        facts["recipe"] = '"><img src=x onerror=y>'
        facts["environment"]["torch"] = evil
        facts["run"]["optim"]["decay"] = f'"{evil}'
        facts["run"]["optim"][f'" onclick="{evil}'] = 1

    edit(run / "run.json", poison)
    line = {"step": 21, "images": 400, f"{evil}/loss": 1.0, f"{evil}/grad_norm": 1.0}
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    p = page(run)
    assert p.all("script") == [{}]  # its own
    assert all(str(image["src"]).startswith("data:") for image in p.all("img"))
    assert not any(name.startswith("on") for _, attrs in p.tags for name in attrs)
    assert f"fewstep {evil}" in p.text
    assert f"Loss of {evil}" in p.text


def test_an_unfinished_run(run: Path) -> None:
    """No model, no measurements, half a log; then a run that has only begun."""
    shutil.rmtree(run / "student")
    (run / "metrics.json").unlink()
    log = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text("\n".join(log[:12]) + '\n{"step": 1')
    p = page(run)
    assert "Not finished: step 12 of 20 (60%)." in p.text
    assert "At the last look fd_digits was 6.00, on 1,000 samples only." in p.text
    assert "None: the run has not produced its model yet" not in p.text  # the teacher is there
    assert "Student" not in p.text
    assert "Not measured: the run is not finished." in p.text
    for name in ("log.jsonl", "gauges.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "grids")
    edit(run / "run.json", lambda facts: facts.update(teacher=str(run / "gone")))
    p = page(run)
    assert "Not finished: step 0 of 20 (0%)." in p.text
    assert "The teacher is not shown:" in p.text
    assert "None: the run has not produced its model yet" in p.text
    assert not p.all("img")
    assert not p.all("svg")


def test_a_training_run(tmp_path: Path) -> None:
    """A teacher has no gauges, and is not measured against itself."""
    run = replace(
        digits_teacher(), steps=4, batch=16, method=Pretrain(sampler=Heun(steps=4)), sample_every=4
    )
    list(execute(run, tmp_path / "t", recipe="digits_teacher"))
    p = page(tmp_path / "t")
    assert "Finished, but not measured yet." in p.text
    assert f"fewstep evaluate {tmp_path / 't'}" in p.text
    assert "Not recorded: gauges" in p.text
    assert {str(i["alt"]).split(":")[0] for i in p.all("img")} >= {"Teacher", "Real, held out"}
    scores = {role: {**SCORES[role], "calls": CALLS[role]} for role in ("real", "teacher")}
    write_json(tmp_path / "t" / "metrics.json", {**scores, "protocol": {"distance": "fd_digits"}})
    f = read_run(tmp_path / "t")
    assert f.role == "teacher"
    told = headline(f, checks(f, {}))
    assert (told.mark, told.title) == ("good", "The teacher is trained, and passes every check.")
    assert told.text.startswith("fd_digits 0.597; real held-out data score 1.26")


def test_warnings_are_on_the_page(run: Path) -> None:
    for spoil, _ in (SICK["recall"], SICK["collapse"], SICK["skipped"]):
        spoil(run)
    p = page(run)
    assert "One call instead of 35, with 3 warnings." in p.text
    assert "Recall is 0.770, the teacher's is 0.830" in p.text
    assert "3 updates of 40 (7.50%)" in p.text
    assert re.search(r"Diversity is 0\.240, less than half of the teacher's", p.text)
    assert "Skipped updates: 3." in p.text
    assert len(p.all("svg")) == 3 + 4 + 5  # one more: skipped updates


def test_refusals(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"is not a run folder \(no run.json in it\)"):
            write_report(path)
    (run / "metrics.json").write_text("[1]")
    with pytest.raises(Damaged, match=r"metrics.json does not hold scores by role"):
        write_report(run)
    healthy(run)
    weights = run / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(Damaged, match=r"model.safetensors is damaged"):
        write_report(run)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[report\]'"):
        write_report(run)
    assert not (run / "report.html").exists()
