"""Latents on disk: drawn from their moments as computed by hand, label by label, and refusals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.config import decode, encode, parse
from fewstep.data.batches import epoch_order
from fewstep.data.latents import latents_of, restored, standardised
from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.domains.latents import LatentMoments
from fewstep.nets.mlp import MLP
from fewstep.recipes.sid_edm import RECIPES
from tests.picture_files import array, as_zip, labelled, moments

COUNT, SIDE = 11, 2
LABELS = np.arange(COUNT) * 3 % 5
MODEL = Model(MLP(), (4, SIDE, SIDE), 5)


def numbers(count: int = COUNT) -> np.ndarray:
    """(count, 8, SIDE, SIDE) means like ImageNet's and deviations that differ."""
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(count, 4, SIDE, SIDE)) * 4
    return np.concatenate([mean, rng.uniform(0.1, 2, mean.shape)], 1).astype("f4")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(as_zip(tmp_path / "sd.zip", labelled(moments(numbers()), LABELS)))


def test_by_hand() -> None:
    """A latent at its channel's mean is 0, one deviation above it 0.5; and back."""
    raw = torch.tensor([[5.81, 3.25, 0.12, -2.15], [9.98, 7.87, 3.83, 1.13], [0.0, 0, 0, 0]])
    expected = [[0] * 4, [0.5] * 4, [-2.905 / 4.17, -1.625 / 4.62, -0.06 / 3.71, 1.075 / 3.28]]
    x0 = standardised(raw[..., None, None])
    torch.testing.assert_close(x0[..., 0, 0], torch.tensor(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(restored(x0)[..., 0, 0], raw, rtol=1e-6, atol=2e-6)
    half = standardised(raw[..., None, None].half())
    assert half.dtype == torch.float16


def test_a_batch_is_the_formula(path: str) -> None:
    """x0 = (mean + deviation n - m) 0.5 / d of the rows in the order of their epoch."""
    source = LatentMoments(path).source(MODEL, data_free=False)
    draws = Draws.range(5, 2 * COUNT, seed=3)
    batch = source(draws)
    rows = epoch_order(draws, COUNT).numpy()
    mean, deviation = np.split(numbers()[rows].astype("f8"), 2, 1)
    raw = mean + deviation * draws.normal("latent", (4, SIDE, SIDE)).numpy()
    m, d = np.array([5.81, 3.25, 0.12, -2.15]), np.array([4.17, 4.62, 3.71, 3.28])
    expected = (raw - m[:, None, None]) * 0.5 / d[:, None, None]
    assert batch.x0 is not None
    assert batch.x0.dtype == torch.float32
    np.testing.assert_allclose(batch.x0.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert batch.cond.tolist() == LABELS[rows].tolist()
    assert torch.equal(batch.z, draws.normal("z", (4, SIDE, SIDE)))
    parts = [source(Draws.range(5 + i, 2, seed=3)).x0 for i in range(0, 2 * COUNT, 2)]
    assert torch.equal(torch.cat(parts), batch.x0)  # type: ignore[arg-type]


def test_draws_have_the_moments_that_are_stored(tmp_path: Path) -> None:
    """One picture, 4000 visits: mean and deviation of every number, within 4.5 errors."""
    x = numbers(1)
    path = as_zip(tmp_path / "one.zip", moments(x))
    source = LatentMoments(str(path)).source(Model(MLP(), (4, SIDE, SIDE)), data_free=False)
    found = source(Draws.range(0, 4000, seed=1)).x0
    assert found is not None
    raw = restored(found).double().numpy()
    mean, deviation = x[0, :4].astype("f8"), x[0, 4:].astype("f8")
    error = 4.5 * deviation / math.sqrt(4000)
    assert (abs(raw.mean(0) - mean) < error).all()
    assert (abs(raw.std(0) - deviation) < error / math.sqrt(2)).all()
    assert (abs(raw.mean(0) - mean - 2 * error) > error).all()  # a negative control


def test_labels_alone_need_no_latent(tmp_path: Path) -> None:
    """Without data the labels are those of the file, though every latent in it is damaged."""
    content = labelled(moments(numbers()), LABELS)
    junk = {name: b"x" * len(data) if ".npy" in name else data for name, data in content.items()}
    first = next(iter(content))
    path = str(as_zip(tmp_path / "sd.zip", {**junk, first: content[first]}))
    draws = Draws.range(0, COUNT, seed=3)
    batch = LatentMoments(path).source(MODEL, data_free=True)(draws)
    assert batch.x0 is None
    assert batch.cond.tolist() == LABELS[epoch_order(draws, COUNT).numpy()].tolist()
    with pytest.raises(ValueError, match=r"sd.zip cannot be used; 10 damaged: .*7 more"):
        LatentMoments(path).source(MODEL, data_free=False)(draws)


def test_without_a_file() -> None:
    draws = Draws.range(0, 500, seed=3)
    batch = LatentMoments().source(MODEL, data_free=True)(draws)
    assert (batch.x0, batch.cond.unique().tolist()) == (None, [0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"say --domain \"LatentMoments\('PATH'\)\""):
        LatentMoments().source(MODEL, data_free=False)


def test_the_recipes_of_edm2_use_it() -> None:
    for name, make in RECIPES.items():
        kind = type(make().domain).__name__
        assert kind == ("LatentMoments" if "edm2" in name else "Pictures")
        assert "data" in str(make.__doc__) or f"{kind}('PATH')" in str(make.__doc__)
    domain = LatentMoments("a.zip", labels=False)
    assert decode(encode(domain)) == parse(repr(domain)) == domain


def test_refusals(tmp_path: Path, path: str) -> None:
    """Each in a sentence that names the file; pickles are refused unopened."""
    x = numbers()
    first, second, *_ = moments(x)
    evil = array(np.array([{"a": 1}], dtype=object))
    cases = {
        "holds no latents": {"a.png": b""},
        "sd.zip: '00000/img-mean-std-00000000' is no sound": {first: b"hello"},
        "is made of Python objects": {first: evil},
        r"means and deviations, numbers of shape \(8, H, W\), got float32 \(4, 2, 2\)": {
            first: array(x[0, :4])
        },
        r"got int32 \(8, 2, 2\)": {first: array(x[0].astype("i4"))},
        "1 of another size than .*0000.npy: .*0001.npy": {second: array(x[0, :, :1])},
        "5 without a label in dataset.json": {"dataset.json": b'{"labels": [["%s", 1]]}'},
        "dataset.json is not readable JSON": {"dataset.json": b"{"},
    }
    for words, change in cases.items():
        change = {k: v.replace(b"%s", first.encode()) for k, v in change.items()}
        content = {**moments(x[:6]), **change}
        if "a.png" in change:
            content = change
        with pytest.raises(ValueError, match=words):
            latents_of(as_zip(tmp_path / "sd.zip", content))
    bad = x[:3].copy()
    bad[1, 0, 0, 0] = np.nan
    content = moments(bad)
    content[list(content)[2]] = array(np.ascontiguousarray(bad[2].reshape(2, 8, 2)))
    found = latents_of(as_zip(tmp_path / "bad.zip", content))
    words = r"1 with numbers that are not finite: .*1.npy; 1 not of the form of the first: .*2.npy"
    with pytest.raises(ValueError, match=words):
        found.take(torch.arange(3))
    for words, content in (
        (r"the model has 5 classes; LatentMoments\(labels=False\) draws", moments(x)),
        ("has labels up to 9, but the model has 5", labelled(moments(x[:10]), range(10))),
    ):
        place = str(as_zip(tmp_path / "sd.zip", content))
        with pytest.raises(ValueError, match=words):
            LatentMoments(place).source(MODEL, data_free=True)
    other = Model(MLP(), (4, 8, 8), 10)
    with pytest.raises(ValueError, match=r"latents of \(4, 2, 2\), but the model is for \(4, 8"):
        LatentMoments(place).source(other, data_free=False)
    with pytest.raises(ValueError, match=r"there is no zip file none.zip of latents"):
        latents_of("none.zip")
