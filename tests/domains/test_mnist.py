"""MNIST: the 2x2 means by hand, refusals, and what its network says of digits.

MNIST is not part of the repository. Digits that it is are scikit-learn's, enlarged, and those of
the stored teacher.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fewstep import config
from fewstep.data import digits, mnist
from fewstep.data.batches import Images, Latents
from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Heun
from fewstep.domains.mnist import Mnist
from fewstep.eval.digit_features import features_and_labels, shipped
from fewstep.eval.metrics import precision_recall
from fewstep.nets.mlp import MLP
from fewstep.recipes.mnist import MODEL, mnist as distillation, mnist_teacher as teacher
from fewstep.storage.model_folder import load_student
from tests.command import fewstep

TEACHER = Path(__file__).parents[2] / "benchmarks/assets/mnist_teacher"
ROWS, KEPT = 40, 30


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 30 training and 10 test pictures, all noise; row i is a digit i modulo 10."""
    monkeypatch.setattr(mnist, "TRAIN", KEPT)
    monkeypatch.setattr(mnist, "TEST", ROWS - KEPT)
    images = np.random.default_rng(0).integers(0, 256, (ROWS, 28, 28, 1), dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", images=images, labels=np.arange(ROWS) % 10)
    return tmp_path / "mnist.npz"


def test_pixels_are_means_of_two_by_two_within_a_black_border() -> None:
    """The border is two pixels wide, so that output (1, 1) is the picture's first 2x2 block."""
    image = torch.zeros(2, 28, 28, 1, dtype=torch.uint8)
    image[0, :2, :2, 0] = torch.tensor([[255, 51], [0, 204]])  # mean 127.5: grey
    image[0, 26, 27, 0] = 102  # the last block: 25.5
    image[1] = 255
    small = mnist.shrink(image, chunk=1)
    expected = torch.full((2, 1, 16, 16), -1.0)
    expected[0, 0, 1, 1], expected[0, 0, 14, 14] = 0.0, -0.8
    expected[1, 0, 1:15, 1:15] = 1.0
    torch.testing.assert_close(small, expected)


def test_first_rows_are_for_training(tiny: Path) -> None:
    train, test = mnist.load_mnist(str(tiny))
    images = torch.from_numpy(np.load(tiny)["images"])
    assert torch.equal(torch.cat([train.x0, test.x0]), mnist.shrink(images))
    assert (len(train.x0), len(test.x0)) == (30, 10)
    assert torch.cat([train.labels, test.labels]).tolist() == [i % 10 for i in range(ROWS)]


def test_sources_and_yardstick(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = Mnist(str(tiny))
    images = domain.source(MODEL, data_free=False)
    assert isinstance(images, Images)
    batch = images(Draws.range(0, KEPT, seed=0))
    assert batch.x0 is not None
    assert sorted(batch.cond.tolist()) == sorted([*range(10)] * 3)
    dropped = Mnist(str(tiny), drop=1.0).source(MODEL, data_free=False)
    assert dropped(Draws.range(0, KEPT, seed=0)).cond.tolist() == [10] * KEPT
    assert domain.source(MODEL, data_free=True) == Latents((1, 16, 16), 10)
    monkeypatch.setattr("fewstep.domains.mnist.MEASURED", 2)
    sample_metrics = domain.sample_metrics()
    assert (sample_metrics.distance, len(sample_metrics.reference)) == ("fd_mnist", 20)
    train, test = mnist.load_mnist(str(tiny))
    assert torch.equal(sample_metrics.reference, train.x0[:20])  # rows 0 and 10 of each class' 3
    assert torch.equal(sample_metrics.held_out_labels, test.labels.repeat_interleave(2))


def test_the_path_is_a_plain_string_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_MNIST", "elsewhere/digits.npz")
    run = teacher()
    assert isinstance(run.domain, Mnist)
    assert (run.domain.path, run.domain.drop) == ("elsewhere/digits.npz", 0.1)
    monkeypatch.delenv("FEWSTEP_MNIST")
    assert config.decode(config.encode(run)) == run
    assert distillation().domain == Mnist("mnist.npz")
    assert distillation().model == run.model


def refused(sentence: str, **arrays: Any) -> Any:
    return pytest.param(arrays, sentence, id=sentence[:30])


WHOLE = np.zeros((ROWS, 28, 28, 1), np.uint8)
LABELS = np.zeros(ROWS, np.int64)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        refused(": images and labels cannot be read: the file holds x", x=WHOLE),
        refused(
            ": images must be (40, 28, 28, 1) uint8, got (39, 28, 28, 1) uint8",
            images=WHOLE[1:],
            labels=LABELS,
        ),
        refused(
            ": images must be (40, 28, 28, 1) uint8, got (40, 28, 28, 1) float32",
            images=WHOLE.astype(np.float32),
            labels=LABELS,
        ),
        refused(
            ": labels must be (40,) integers, got (40,) float64", images=WHOLE, labels=LABELS / 2
        ),
        refused(": labels are 0 to 9, got 0 to 10", images=WHOLE, labels=np.arange(ROWS) % 11),
        refused(
            ": images and labels cannot be read: the array 'images' is made of Python objects",
            images=np.array([None]),
            labels=LABELS,
        ),
    ],
)
def test_other_files_are_refused(
    tiny: Path, tmp_path: Path, arrays: dict[str, Any], sentence: str
) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, **arrays)
    with pytest.raises(ValueError, match=f"^{re.escape(str(other))} ?{re.escape(sentence)}"):
        mnist.load_mnist(str(other))


def test_what_is_no_npz_or_damaged_is_refused(tiny: Path, tmp_path: Path) -> None:
    for name, content in {"text.npz": b"text", "empty.npz": b"", "cut.npz": b"PK\x03\x04"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is no \.npz file$"):
            mnist.load_mnist(str(tmp_path / name))
    whole = bytearray(tiny.read_bytes())
    whole[5000] ^= 1  # one bit of the pictures
    tiny.write_bytes(whole)
    with pytest.raises(ValueError, match=r"images and labels cannot be read: 'images' is"):
        mnist.load_mnist(str(tiny))


def test_without_the_file_no_folder_is_made(tmp_path: Path) -> None:
    """Data-free training too needs it, to measure the student."""
    where = f"--domain.path={tmp_path / 'none.npz'}"
    done = fewstep("train", "mnist_teacher", "--out", str(tmp_path / "run"), where)
    assert done.code == 2
    assert "there is no MNIST file" in done.err
    assert "--domain.path or the environment variable FEWSTEP_MNIST" in done.err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="there is no MNIST file"):
        Mnist(str(tmp_path / "none.npz")).source(MODEL, data_free=True)
    with pytest.raises(ValueError, match=r"got Model.shape \(2,\) with 0$"):
        Mnist().source(Model(MLP(8, 1), (2,)), data_free=True)


def enlarged(x: torch.Tensor) -> torch.Tensor:
    """Digits of 8x8 pixels, 12 pixels wide within a border of 2, as MNIST has them."""
    wide = F.interpolate(x, size=(12, 12), mode="bilinear", align_corners=False)
    return F.pad(wide, (2, 2, 2, 2), value=-1.0)


def test_digits_of_other_hands_are_recognised() -> None:
    """94 % of another set, on which the network was never trained; noise is no digit."""
    train, test = digits.load_digits()
    features, labels = features_and_labels("mnist", enlarged(train.x0))
    assert features.shape == (1433, 32)
    assert float((labels == train.labels).double().mean()) > 0.92
    assert shipped("mnist") is shipped("mnist")
    others, _ = features_and_labels("mnist", enlarged(test.x0))
    assert min(precision_recall(features, others)) > 0.8
    grey = torch.randn(100, *mnist.SHAPE, generator=torch.Generator().manual_seed(0))
    noise, _ = features_and_labels("mnist", grey.clamp(-1, 1))
    assert max(precision_recall(features, noise)) < 0.1


@pytest.mark.slow
@pytest.mark.skipif(not TEACHER.is_dir(), reason="benchmarks are not part of this distribution")
def test_the_stored_teacher_writes_the_digits_it_is_told() -> None:
    """On average 0.95 of them with 35 calls; with 15, of 200, within four standard errors."""
    generator = load_student(TEACHER)
    assert generator.model == MODEL
    x = replace(generator, sampler=Heun(steps=8)).sample(range(200))
    assert abs(float(x.clamp(-1, 1).std()) - mnist.SIGMA_DATA) < 0.05
    _, labels = features_and_labels("mnist", x.clamp(-1, 1))
    right = float((labels == torch.arange(200) % 10).double().mean())
    assert right > 0.949 - 4 * (0.949 * 0.051 / 200) ** 0.5
    _, free = features_and_labels(
        "mnist",
        replace(generator, sampler=Heun(steps=8)).sample(range(200), torch.full((200,), 10)),
    )
    assert float((free == torch.arange(200) % 10).double().mean()) < 0.2  # the null label
