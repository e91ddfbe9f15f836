"""The scripts in examples/ run as a reader runs them, and what they print is right."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import GaussianMixture, load_student

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
EXACT = -1.39
"""Mean log-likelihood of the ring of six under itself; 10,000 samples tell it to 0.01."""


def run(name: str, folder: Path, *args: str) -> str:
    """What a script prints, started in an empty folder."""
    told = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *args],
        cwd=folder,
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(text: str, before: str) -> float:
    """The number that stands after `before`, which stands once."""
    found = re.findall(re.escape(before) + rf"({NUMBER})", text)
    assert len(found) == 1, f"{before!r} in {text!r}"
    return float(found[0])


def fits(likelihood: float, exact: float, margin: float) -> bool:
    """Whether samples are as likely as exact ones; much likelier ones have lost variety."""
    return abs(exact - EXACT) < 0.05 and abs(likelihood - exact) < margin


def test_a_smeared_ring_does_not_fit() -> None:
    """Right radius, modes lost: the widest margin below refuses it, and takes exact samples."""
    ring, now = GaussianMixture.ring(count=6, std=0.2), torch.tensor(1e-3)
    torch.manual_seed(0)
    exact = float(ring.log_prob(ring.sample(10_000), now).mean())
    angle, radius = 2 * torch.pi * torch.rand(10_000), 1 + 0.2 * torch.randn(10_000)
    smeared = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    assert fits(exact, exact, 0.02)
    assert not fits(float(ring.log_prob(smeared, now).mean()), exact, 0.45)
    assert not fits(exact, exact + 0.1, 0.45)


@pytest.mark.slow
def test_one_step_gaussian(tmp_path: Path) -> None:
    """Nearer to the truth at each look; likelihoods, which few samples decide, are shown alone."""
    lines = run("one_step_gaussian.py", tmp_path).splitlines()[1:]
    rows = [[float(word) for word in re.findall(NUMBER, line)] for line in lines]
    *looks, (exact_distance, exact) = rows
    assert [row[0] for row in looks] == [200, 400, 600, 800]
    distances = [row[1] for row in looks]
    assert distances == sorted(distances, reverse=True)
    assert abs(exact - EXACT) < 0.05
    assert exact_distance < 0.02
    assert looks[-1][1] < 0.05 < looks[0][1]


@pytest.mark.slow
def test_own_network(tmp_path: Path) -> None:
    """The velocity network fits the ring roughly, and its student follows it in one call."""
    told = run("own_network.py", tmp_path)
    exact = number(told, "exact samples: ")
    teacher = number(told, "teacher, 39 network calls: ")
    student = number(told, "student, one call: ")
    assert fits(teacher, exact, 0.35)
    assert fits(student, exact, 0.45)
    assert abs(student - teacher) < 0.25


@pytest.mark.slow
def test_own_method(tmp_path: Path) -> None:
    """Regression leaves samples between the modes, as the script says; SiD does not."""
    told = run("own_method.py", tmp_path)
    exact = number(told, "exact samples: ")
    assert fits(number(told, "SiD: mean log-likelihood "), exact, 0.25)
    assert number(told, "Regress: mean log-likelihood ") < exact - 1


def cells(path: Path, count: int = 64, side: int = 8, scale: int = 6, gap: int = 4) -> np.ndarray:
    """(count, side * side): the pictures of a square grid, read back from its file."""
    canvas = np.asarray(Image.open(path))
    columns, step = round(count**0.5), side * scale + gap
    assert canvas.shape == (columns * step + gap,) * 2
    corners = [(gap + i // columns * step, gap + i % columns * step) for i in range(count)]
    pictures = [canvas[y : y + step - gap : scale, x : x + step - gap : scale] for y, x in corners]
    return np.stack(pictures).reshape(count, -1)


def legible(pictures: np.ndarray, digits: np.ndarray) -> float:
    """The share that a vote of three nearest real digits reads as what it should be."""
    datasets = pytest.importorskip("sklearn.datasets")
    neighbours = pytest.importorskip("sklearn.neighbors")
    real = datasets.load_digits()
    judge = neighbours.KNeighborsClassifier(3).fit(real.data / 16, real.target)
    return float((judge.predict(pictures / 255) == digits).mean())


@pytest.mark.slow
def test_digits_in_python(tmp_path: Path) -> None:
    """Both are near to real digits, and what is drawn reads 0 to 9 over and over."""
    told = run("digits_in_python.py", tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["student.png", "teacher.png"]
    assert number(told, "teacher: 35 network call(s), fd_digits ") < BOUND
    assert number(told, "student: 1 network call(s), fd_digits ") < BOUND
    digits = np.arange(64) % 10
    for name in ("teacher", "student"):
        pictures = cells(tmp_path / f"{name}.png")
        assert legible(pictures, digits) > 0.85, name
        assert legible(pictures, (digits + 1) % 10) < 0.3, name


BOUND = 6.0
"""Of fd_digits: three times what the student reaches."""


def test_the_bound_of_digits_refuses_what_is_nearly_a_digit() -> None:
    """Real digits are far below it; under noise of a third of their range they are above."""
    pytest.importorskip("sklearn")
    from fewstep.domains.digits import Digits
    from fewstep.eval.domain_scores import score

    measures = Digits().sample_metrics()
    torch.manual_seed(0)
    noisy = measures.held_out + 0.67 * torch.randn_like(measures.held_out)
    assert score(measures.held_out, None, measures)["fd_digits"] < BOUND / 3
    assert score(noisy, None, measures)["fd_digits"] > BOUND


@pytest.mark.slow
def test_tiny_pipeline(tmp_path: Path) -> None:
    """All of its steps; stock diffusers draws as the student does, in its four calls."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    told = run("tiny_pipeline.py", tmp_path)
    steps = re.findall(r"step (\d+) of 40", told)
    assert steps == ["10", "20", "30", "40"]
    assert number(told, "differs from the student by ") <= 1e-5
    size, folder = re.findall(r"one picture of (\(\d+, \d+\)) pixels in (\S+)", told)[0]
    assert size == "(16, 16)"
    scheduler = json.loads((Path(folder) / "scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "LCMScheduler"
    assert scheduler["num_train_timesteps"] == 1000
    home = Path(folder).parent
    assert home.parent == tmp_path
    assert load_student(home / "run").sampler.calls == 4


def test_read_a_run(tmp_path: Path, finished: Path) -> None:
    """Its numbers are those of the log, its pixels those of the student."""
    told = run("read_a_run.py", tmp_path, str(finished / "runs" / "sid"))
    assert told.startswith("digits: SiD(sampler=FewStep(")
    log = (finished / "runs" / "sid" / "log.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, log) if "step" in row]
    assert number(told, "last student loss ") == float(f"{rows[-1]['student/loss']:.4g}")
    assert "\n20 steps, " in told
    norms = [row["student/grad_norm"] for row in rows if "student/grad_norm" in row]
    assert number(told, "gradient norms from ") == float(f"{min(norms):.3g}")
    assert "student: 1 network call(s), pictures of (1, 8, 8)\n" in told
    pixels = json.loads(told.rpartition("sample 0: ")[2])
    expected = load_student(finished / "runs" / "sid").sample(range(4))
    assert pixels == pytest.approx(expected[0].flatten()[:4].tolist(), abs=1e-5)
    assert pixels != pytest.approx(expected[1].flatten()[:4].tolist(), abs=1e-3)


def unknown(tree: ast.AST) -> Iterator[str]:
    """What a script takes from fewstep that is not there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fewstep"):
            if importlib.util.find_spec(str(node.module)) is None:
                yield str(node.module)
                continue
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    yield f"{node.module}.{alias.name}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_script_imports_is_there(script: Path) -> None:
    """So that a name that moves is missed in seconds, whatever the training takes."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    assert list(unknown(tree)) == []


def test_a_moved_name_is_missed() -> None:
    wrong = "from fewstep import SiD, Sid\nfrom fewstep.gone import x\nfrom torch import nothing"
    assert list(unknown(ast.parse(wrong))) == ["fewstep.Sid", "fewstep.gone"]


def test_the_docs_name_every_script() -> None:
    """One line each under Examples, and each has a test above."""
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    listed = page.partition("\n## Examples\n")[2].partition("\n## ")[0]
    names = re.findall(r"^- `(\w+)\.py`: ", listed, re.M)
    assert sorted(names) == [script.stem for script in SCRIPTS]
    assert len(names) == 6
    assert {f"test_{name}" for name in names} <= globals().keys()
