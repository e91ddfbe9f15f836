"""fewstep stats and fewstep evaluate --protocol: values, names, and continuing."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.diffusion.pixels import to_uint8
from fewstep.eval.metrics import (
    ClassProbabilities,
    density_coverage,
    frechet,
    inception_score,
    kid,
    precision_recall,
)
from fewstep.report.formatting import short
from fewstep.storage.files import digest
from fewstep.storage.model_folder import load_student
from tests.command import fewstep, tree
from tests.picture_files import as_folder, as_zip, files, labelled

MINE = '''
import torch

class Small:
    """The mean of each quarter; it tells when it is called."""

    name, dim = "small", 4
    calls = 0

    def __call__(self, pictures):
        Small.calls += len(pictures)
        if Small.calls > Small.limit:
            raise KeyboardInterrupt
        x = pictures.float()[..., 0] / 255
        x = x.view(-1, 2, 4, 2, 4).mean((2, 4)).flatten(1)
        return x, 5 * x

    limit = 10**9
'''
EVALUATE = ("evaluate", "runs/sid", "--protocol", "fid50k", "--features", "mine.py:Small")
SHORT = (*EVALUATE, "--reference", "ref.npz", "--samples", "120", "--runs", "2")


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, a network of one's own, and reference statistics of the digits."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs", "runs")
    Path("mine.py").write_text(MINE)
    from fewstep.data import digits

    np.savez("digits.npz", images=to_uint8(digits.load_digits()[0].x0).numpy())
    made = fewstep("stats", "digits.npz", "--features", "mine.py:Small", "--out", "ref.npz")
    assert (made.code, made.out) == (0, "ref.npz\n")
    return tmp_path


def features(images: np.ndarray) -> torch.Tensor:
    """Small's, by numpy."""
    x = images[..., 0].astype(np.float32) / 255
    return torch.from_numpy(x.reshape(-1, 2, 4, 2, 4).mean((2, 4)).reshape(-1, 4))


def test_the_numbers_are_those_of_the_pictures(place: Path) -> None:
    """Each run against the metrics of its own pictures; best, mean and deviation of the runs."""
    done = fewstep(*SHORT)
    assert done.code == 0, done.err
    report = json.loads(Path("runs/sid/evaluation/small-120.json").read_text())
    real = features(np.load("digits.npz")["images"])
    assert report["reference"]["pictures"] == len(real) == 1433
    assert np.load("ref.npz")["kept"].shape == (1433, 4)
    generator = load_student("runs/sid")
    for run in (0, 1):
        seeds = range(run * 120, (run + 1) * 120)
        x = features(to_uint8(generator.sample(seeds)).numpy())
        mean, spread = inception_score([ClassProbabilities.of(5 * part) for part in x.split(12)])
        precision, recall = precision_recall(real, x)
        density, coverage = density_coverage(real, x)
        expected = {
            "FD(small, 120)": frechet(x, real),
            "IS(small, 120)": mean,
            "IS std(small, 120)": spread,
            "IS of all(small, 120)": ClassProbabilities.of(5 * x).score(),
            "KID(small, 120)": kid(real, x),
            "precision(small, 120)": precision,
            "recall(small, 120)": recall,
            "density(small, 120)": density,
            "coverage(small, 120)": coverage,
        }
        found = report["runs"][run]
        assert found.pop("seeds") == [run * 120, run * 120 + 119]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
    distances = [run["FD(small, 120)"] for run in report["runs"]]
    assert report["best run"] == distances.index(min(distances))
    assert report["best"] == report["runs"][report["best run"]]
    assert report["mean"]["FD(small, 120)"] == pytest.approx(sum(distances) / 2)
    deviation = abs(distances[0] - distances[1]) / 2**0.5
    assert report["std"]["FD(small, 120)"] == pytest.approx(deviation)
    assert "FID" not in done.out + json.dumps(report)
    assert f"{min(distances):.5g}" in done.out


def test_the_report_shows_what_was_measured(place: Path) -> None:
    """Every number of every run under its own name, in the page of a run without other measures.

    A file that has earned the name FID keeps it, one of 120 pictures does not, whatever it says;
    one of another model is told apart.
    """
    assert fewstep(*SHORT).code == 0
    folder = Path("runs/sid/evaluation")
    stored = json.loads((folder / "small-120.json").read_text())
    Path("runs/sid/metrics.json").unlink(missing_ok=True)
    text = (folder / "small-120.json").read_text().replace("FD(small, 120)", "FID")
    (folder / "few.json").write_text(text.replace("recall(small, 120)", "recall"))
    text = text.replace('"samples": 120', '"samples": 50000')
    (folder / "inception-50000.json").write_text(text.replace(stored["model"], "0" * 64))
    assert fewstep("report", "runs/sid").code == 0
    page = html.unescape(Path("runs/sid/report.html").read_text(encoding="utf-8"))
    titles, tables = [], []
    for part in page.split("<h3>As papers report it: ")[1:]:
        titles.append(part.partition("</h3>")[0])
        rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', part, re.DOTALL)
        value = r'<data value="([^"]+)">'
        tables.append({name: [float(x) for x in re.findall(value, r)] for name, r in rows[:9]})
        assert "The best run is run" in part
        assert ("another model" in part) == (titles[-1] == "inception-50000")
    assert titles == ["few", "inception-50000", "small-120"]
    columns = [*stored["runs"], stored["best"], stored["mean"]]
    expected = {name: [column[name] for column in columns] for name in stored["best"]}
    assert tables[2] == tables[0] == expected
    assert list(tables[1].values()) == list(expected.values())
    assert list(tables[1]) == ["FID", *list(expected)[1:]]
    best, mean = (stored[key]["FD(small, 120)"] for key in ("best", "mean"))
    title = f"FD(small, 120) {short(best)}, the best of 2 runs; {short(mean)} on average."
    assert f'<p class="lead">{title} {title}</p>' in page
    (folder / "small-120.json").write_text('{"runs": []}')
    done = fewstep("report", "runs/sid")
    words = "fewstep: runs/sid/evaluation/small-120.json does not hold an evaluation\n"
    assert done == (2, "", words)


def test_an_interrupted_evaluation_continues(place: Path) -> None:
    """Stopped in the middle, damaged in one part: the rest is kept, the report is the same."""
    whole = place / "whole"
    shutil.copytree("runs/sid", whole)
    command = ["evaluate", "whole", *SHORT[2:]]
    assert fewstep(*command).code == 0
    text = Path("mine.py").read_text()
    name = f"file_mine_{digest(Path('mine.py'))[:16]}"
    Path("mine.py").write_text(text.replace("10**9", "100"))
    stopped = fewstep(*SHORT, "--batch", "5")
    assert stopped.code == 130
    assert "run the same command again to continue" in stopped.err
    parts = Path("runs/sid/evaluation/small-120")
    made = sorted(p.parent.name for p in parts.rglob("manifest.json"))
    assert made == [f"part-{i}" for i in range(8)]  # 96 pictures
    stored = parts / "run-0" / "part-3" / "part.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1])
    Path("mine.py").write_text(text)
    before = sys.modules[name].Small.calls
    done = fewstep(*SHORT, "--batch", "5")
    assert done.code == 0, done.err
    assert "7 of 20 parts are there already" in done.err
    assert sys.modules[name].Small.calls == before + 240 - 7 * 12
    reports = [
        json.loads((p / "evaluation/small-120.json").read_text())
        for p in (Path("runs/sid"), whole)
    ]
    for one, two in zip(reports[0]["runs"], reports[1]["runs"], strict=True):
        assert one.pop("seeds") == two.pop("seeds")
        assert one == pytest.approx(two, rel=1e-5, abs=1e-7)
    again = fewstep(*SHORT, "--batch", "5")
    assert again.out == done.out
    assert sys.modules[name].Small.calls == before + 240 - 7 * 12


def test_another_model_in_the_same_folder_is_measured_anew(place: Path) -> None:
    few = (*SHORT[2:], "--samples", "20", "--runs", "1")
    shutil.copytree("runs/sid/student", "model")
    assert fewstep("evaluate", "model", *few).code == 0
    for name in ("model.json", "model.safetensors", "manifest.json"):
        shutil.copy(f"runs/teacher/student/{name}", "model")
    done = fewstep("evaluate", "model", *few)
    assert done.code == 0
    assert "parts are there" not in done.err
    direct = fewstep("evaluate", "runs/teacher/student", *few)  # any model's folder
    assert direct.out == done.out


def test_statistics_of_pictures_of_any_kind(place: Path) -> None:
    """The same of a folder and of a zip file as of the arrays in the same order."""
    images = np.load("digits.npz")["images"][:30]
    as_folder(Path("pictures"), {**files(images), "note.txt": b"not a picture"})
    as_zip(Path("pictures.zip"), labelled(files(images), range(30)))
    x = features(images).double()
    for source in ("pictures", "pictures.zip"):
        out = f"{source}.stats.npz"
        made = fewstep(
            "stats", source, "--features", "mine.py:Small", "--out", out, "--batch", "7"
        )
        assert made.code == 0, made.err
        found = np.load(out)
        assert found["count"] == 30
        np.testing.assert_allclose(found["mu"], x.mean(0).numpy(), rtol=1e-6)
        covariance = torch.cov(x.T).numpy()
        np.testing.assert_allclose(found["sigma"], covariance, rtol=1e-5, atol=1e-9)
        kept = np.sort(found["kept"].astype("f8"), 0)
        np.testing.assert_allclose(kept, x.sort(0).values.numpy(), rtol=1e-6)


STATS = "stats digits.npz --features mine.py:Small --out"
FID = "evaluate runs/sid --protocol fid50k"
CASES = {
    "stats": "fewstep stats needs: data, --out; fewstep stats --help tells more",
    "stats digits.npz --out r.npz": "a feature network is needed: --features PATH, or set "
    "FEWSTEP_INCEPTION; docs/evaluation.md tells where to get one",
    f"{STATS} r.txt": "--out must be an .npz file in an existing folder, got r.txt",
    f"{STATS} no/r.npz": "--out must be an .npz file in an existing folder, got no/r.npz",
    f"{STATS} r.npz --keep -1": "--keep must not be negative, and --batch at least 1",
    f"{STATS} r.npz --device abacus": "this machine has no device 'abacus'; leave --device out "
    "for the CPU",
    "stats no.npz --features mine.py:Small --out r.npz": "there is no file or folder no.npz",
    "stats ref.npz --features mine.py:Small --out r.npz": "ref.npz has no array 'images'; it "
    "holds count.npy, features.npy, kept.npy, mu.npy, sigma.npy",
    "stats empty --features mine.py:Small --out r.npz": "empty holds no picture (.jpeg, .jpg, "
    ".png, .webp)",
    "stats mixed --features mine.py:Small --out r.npz": "mixed cannot be used; 1 of another "
    "shape than 1x8x8: b.png (1x4x4)",
    "stats hurt --features mine.py:Small --out r.npz": "hurt: the first, a.png, is damaged",
    FID: "--protocol fid50k needs --reference FILE; 'fewstep stats' makes one",
    f"{FID} --reference no.npz --features mine.py:Small": "there is no file no.npz",
    f"{FID} --reference ref.npz --features w.pth": "w.pth is no feature network: expected "
    "Inception's weights (.pth, .pt, .safetensors), a DINOv2 folder, or my_file.py:Name",
    f"{FID} --reference ref.npz --features mine.py:Small --runs 0": "an evaluation needs at "
    "least 20 samples and one run, got 50000 and 0",
    f"{FID} --reference ref.npz --features mine.py:Small --samples 19": "an evaluation needs at "
    "least 20 samples and one run, got 19 and 3",
    "evaluate runs/sid --reference ref.npz": "--reference needs --protocol fid50k, or --prompts",
    f"{FID.replace('runs/sid', 'empty')} --reference ref.npz --features mine.py:Small": "empty "
    "holds no finished model (no manifest.json in it)",
    f"{FID.replace('runs/sid', 'half')} --reference ref.npz --features mine.py:Small": "half is "
    "not finished; continue it with: fewstep train half",
}


def test_wrong_input_is_one_sentence(place: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("FEWSTEP_INCEPTION", raising=False)
    for name in ("empty", "mixed", "hurt", "half"):
        Path(name).mkdir()
    for name, side in (("a", 8), ("b", 4)):
        Image.new("L", (side, side)).save(f"mixed/{name}.png")
    Path("hurt/a.png").write_text("hello")
    Path("half/run.json").write_text('{"run": {}, "command": "fewstep train half"}')
    before = tree(place)
    for command, message in CASES.items():
        assert fewstep(*command.split()) == (2, "", f"fewstep: {message}\n"), command
    after = tree(place)
    assert {name for name in after if "__pycache__" not in name} == set(before)
