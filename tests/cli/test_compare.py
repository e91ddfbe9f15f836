"""fewstep compare, as a person and as a script use it."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

from tests.command import DISTIL, TEACH, fewstep
from tests.report_folder import edit, healthy, invented


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and two students of it with two seeds each, the last not finished."""
    home = tmp_path_factory.mktemp("runs")
    teacher = str(home / "teacher")
    assert fewstep(*TEACH, "--out", teacher).code == 0
    for alpha in ("1.0", "1.2"):
        for seed in ("0", "1"):
            out = str(home / f"alpha{alpha}-{seed}")
            args = ("--teacher", teacher, "--out", out, "--method.alpha", alpha, "--seed", seed)
            assert fewstep(*DISTIL, *args).code == 0
            healthy(Path(out))
    return home


def names(runs: Path) -> list[str]:
    return sorted(str(p) for p in runs.glob("alpha*"))


def test_the_page_shows_every_setting_and_nothing_from_outside(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = fewstep("compare", *names(runs), "--out", str(page))
    assert found.code == 0, found.err
    text = page.read_text(encoding="utf-8")
    assert re.search("<h1>(.*)</h1>", text)[1] == "4 runs in 2 settings"  # type: ignore[index]
    assert text.count("data:image/png;base64,") == 3  # the teacher, and one of each setting
    assert text.count("<svg") == 4
    assert "default-src 'none'" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "<code>method.<wbr>alpha</code>" in text
    lines = found.out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == [
        "run",
        "teacher",
        "alpha1.0",
        "alpha1.2",
    ]
    assert "0.597" in lines[1]
    assert "0, 1" in lines[2]


def test_scripts_read_json_and_csv(runs: Path, tmp_path: Path) -> None:
    found = fewstep("compare", *names(runs), "--json", "--no-page")
    stored = json.loads(found.out)
    assert [run["name"] for run in stored["runs"]] == [Path(n).name for n in names(runs)]
    assert stored["settings"] == {"method.alpha": {"alpha1.0": "1.0", "alpha1.2": "1.2"}}
    table = list(
        csv.DictReader(io.StringIO(fewstep("compare", *names(runs), "--csv", "--no-page").out))
    )
    assert [row["fd_digits"] for row in table] == ["0.6713"] * 4
    assert float(table[0]["forwards"]) == stored["runs"][0]["forwards"]
    assert not list(tmp_path.iterdir())


def test_wrong_input_is_one_sentence(runs: Path, tmp_path: Path) -> None:
    for args, words in (
        ((), "needs: RUN"),
        ((str(tmp_path),), "run.json"),
        ((names(runs)[0], "--out", str(tmp_path)), "is a folder; name a file"),
        ((names(runs)[0], "--out", str(tmp_path / "no" / "page.html")), "cannot write"),
        ((names(runs)[0], "--json", "--csv"), "two forms of the result"),
        ((names(runs)[0], names(runs)[0]), "named twice"),
    ):
        found = fewstep("compare", *args)
        assert found.code == 2, found.out
        assert words in found.err
        assert len(found.err.strip().splitlines()) == 1


def test_a_run_without_a_model_is_named_and_the_rest_shown(runs: Path, tmp_path: Path) -> None:
    lone = tmp_path / "lone"
    invented(lone)
    edit(lone / "run.json", lambda f: f["run"].update(seed=9))
    page = tmp_path / "page.html"
    found = fewstep("compare", names(runs)[0], str(lone), "--out", str(page), "--no-teacher")
    assert found.code == 0, found.err
    assert "lone is not shown" in page.read_text(encoding="utf-8")
