"""Arrays of any shape as data: what a batch holds, what is refused, and a run from end to end."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.config import decode, encode, parse
from fewstep.data.batches import epoch_order
from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.domains.arrays import Arrays
from fewstep.domains.domain import Domain
from fewstep.nets.mlp import MLP
from fewstep.storage.model_folder import load_student
from tests.command import fewstep

SHAPES = [(9,), (2, 6), (1, 3, 2, 2), (4, 2, 3)]


def stored(path: Path, shape: tuple[int, ...], count: int = 12, **more: np.ndarray) -> np.ndarray:
    """Numbers that say which sample they are of; written as doubles."""
    x = np.random.default_rng(0).normal(0, 0.5, (count, *shape))
    np.savez(path, x=x, **more)
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_batch_holds_the_arrays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Rows and labels belong together; each epoch visits every one once."""
    labels = np.arange(12) % 3
    x = stored(tmp_path / "set.npz", shape, labels=labels)
    domain = Arrays(str(tmp_path / "set.npz"))
    draws = Draws.range(0, 24, 5)
    rows = epoch_order(draws, 12)
    assert sorted(rows[:12].tolist()) == list(range(12))
    batch = domain.source(Model(MLP(), shape, 3), data_free=False)(draws)
    assert batch.x0 is not None
    assert torch.equal(batch.x0, torch.from_numpy(x.astype(np.float32))[rows])
    assert torch.equal(batch.cond, torch.from_numpy(labels)[rows])
    assert torch.equal(batch.z, draws.normal("z", shape))
    free = domain.source(Model(MLP(), shape, 3), data_free=True)(draws)
    assert free.x0 is None
    assert torch.equal(free.cond, batch.cond)
    assert domain.source(Model(MLP(), shape), data_free=False)(draws).cond is None


def test_it_is_recorded_and_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    stored(path, (4,))
    settled = Arrays(str(path)).settled()
    assert isinstance(settled, Arrays)
    assert len(settled.sha256) == 64
    assert settled.settled() == settled
    assert decode(encode(settled), Domain) == settled
    assert parse(repr(settled), Domain) == settled
    np.savez(path, x=np.zeros((3, 4)))
    with pytest.raises(ValueError, match="no longer holds what the run was started with"):
        settled.settled()


WRONG: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "no x": ({"y": np.zeros((2, 4))}, "has no array 'x'; it holds y.npy"),
    "integers": ({"x": np.zeros((2, 4), int)}, r"x must be floats of shape \(N, \*\).*got int64"),
    "numbers": ({"x": np.zeros(4)}, r"x must be floats of shape \(N, \*\)"),
    "none": ({"x": np.zeros((0, 4))}, r"one sample or more, got float64 \(0, 4\)"),
    "another shape": ({"x": np.zeros((2, 5))}, r"arrays of \(5,\), .* say --model.shape 5"),
    "not finite": ({"x": np.full((2, 4), math.nan)}, "a number that is not finite"),
    "too few labels": (
        {"x": np.zeros((2, 4)), "labels": np.zeros(3, int)},
        "labels must be 2 integers",
    ),
    "objects": ({"x": np.array([[{}]], dtype=object)}, "made of Python objects"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, case: str) -> None:
    arrays, message = WRONG[case]
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
        Arrays(str(path)).source(Model(MLP(), (4,)), data_free=False)


def test_what_is_no_file_of_arrays(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(b"PK")
    for name in ("set.zip", "missing.npz"):
        with pytest.raises(ValueError, match=r"is no \.npz file of arrays"):
            Arrays(str(tmp_path / name)).settled()
    with pytest.raises(ValueError, match="say --domain \"Arrays\\('PATH'\\)\""):
        Arrays().source(Model(MLP(), (4,)), data_free=False)


TINY = ("--model.net", "MLP(16,1)", "--batch", "4", "--steps", "4", "--sample-every", "2")


@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, marks=[pytest.mark.slow] * (len(s) % 2 == 0)) for s in SHAPES],
    ids=str,
)
def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    """Trained, distilled, sampled, shown and exported; samples are data again."""
    monkeypatch.chdir(tmp_path)
    stored(Path("set.npz"), shape)
    sizes = [*map(str, shape)]
    data = ("--domain", "Arrays('set.npz')", "--model.shape", *sizes, "--model.classes", "0")
    for words in (
        ("train", "digits_teacher", *data, *TINY, "--out", "teacher"),
        (
            *("distill", "digits", "--teacher", "teacher", "--domain", "Arrays('set.npz')"),
            *("--method", "MeanFlow()", *TINY, "--out", "run"),
        ),
        ("sample", "run", "--seeds", "0-5", "--out", "samples.npz"),
        ("sample", "run", "--seeds", "0-5", "--out", "samples.png"),
        ("report", "run"),
        ("export", "run", "run.pt2", "--to", "pt2"),
    ):
        done = fewstep(*words)
        assert done.code == 0, done.err
    x = load_student("run").sample(range(6))
    assert np.array_equal(np.load("samples.npz")["x"], x.numpy())
    draws = Draws.range(0, 6)
    again = Arrays("samples.npz").source(Model(MLP(), shape), data_free=False)(draws)
    assert again.x0 is not None
    assert torch.equal(again.x0, x[epoch_order(draws, 6)])
    page = Path("run/report.html").read_text()
    assert "100 pictures in 10 columns" in page
    assert page.count("data:image/png") >= 4
    made = torch.export.load("run.pt2").module()
    z = Draws(torch.arange(6), 0, "sample/").normal("z", shape)
    torch.testing.assert_close(made({"z": z}), x, rtol=1e-5, atol=1e-5)
    student = fewstep(
        "sample", "run/student", "--seeds", "0-5", "--vae", "none", "--out", "same.npz"
    )
    assert student.code == 0, student.err
    assert np.array_equal(np.load("same.npz")["x"], x.numpy())
    done = fewstep("evaluate", "run")
    assert "its domain, Arrays, has no metrics" in done.err
