"""Reference statistics: made, read in three formats, and refused where they are another's."""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.eval.features import PublishedFeatures
from fewstep.eval.reference import Gatherer, read_reference


class Pixels:
    """Features that are the first three pixels."""

    name, dim = "pixels", 3

    def __call__(self, pictures: Tensor) -> tuple[Tensor, None]:
        return pictures.flatten(1)[:, :3].float(), None


class Stand(Pixels, PublishedFeatures):
    """A stand-in for Inception of an unknown file."""

    family, label, dim = "fid", "inception", 3
    name = PublishedFeatures.name

    def __init__(self) -> None:
        super().__init__("0123456789abcdef")


def batches(count: int = 50, size: int = 7) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, 2, 2, 1), generator=generator, dtype=torch.uint8)
    return x.split(size)


def made(path: Path, features: Any, size: int = 7, keep: int = 0) -> Path:
    gatherer = Gatherer(features, keep)
    assert list(gatherer.run(batches(size=size)))[-1] == 50
    gatherer.save(path)
    return path


def test_what_is_made_is_read(tmp_path: Path) -> None:
    """Moments and kept features; whatever the batches; every kept picture is one of them, once."""
    path = made(tmp_path / "a.npz", Pixels(), keep=20)
    found = read_reference(path, Pixels())
    x = torch.cat(batches()).flatten(1)[:, :3].double()
    torch.testing.assert_close(found.moments.mu, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.moments.sigma, torch.cov(x.T), rtol=1e-10, atol=1e-9)
    assert (found.count, found.sha256) == (50, hashlib.sha256(path.read_bytes()).hexdigest())
    other = read_reference(made(tmp_path / "b.npz", Pixels(), size=50, keep=20), Pixels())
    assert found.kept is not None
    assert other.kept is not None
    assert torch.equal(found.kept, other.kept)
    rows = [int((x == row).all(1).nonzero()[0]) for row in found.kept.double()]
    assert len(set(rows)) == 20
    assert max(rows) > 40  # not the first twenty
    everyone = read_reference(made(tmp_path / "c.npz", Pixels(), keep=90), Pixels()).kept
    assert everyone is not None
    assert torch.equal(everyone.double(), x)
    assert read_reference(made(tmp_path / "d.npz", Pixels()), Pixels()).kept is None


def test_every_picture_is_as_likely_to_be_kept() -> None:
    """200 reservoirs, 10 of 50 places: chi-squared of 49 degrees within 4 deviations.

    The kept are ten different ones, which makes the counts less noisy by the factor 1 - 10/50.
    """
    x, counts = torch.arange(50, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 3, 1), 0
    for seed in range(200):
        gatherer = Gatherer(Pixels(), keep=10)
        gatherer.random.manual_seed(seed)
        list(gatherer.run([x]))
        places = torch.stack(gatherer.kept)[:, 0].long()
        counts = counts + torch.bincount(places, minlength=50).double()
    chi = float(((counts - 40) ** 2 / (40 * 0.8)).sum())
    assert abs(chi - 49) < 4 * (2 * 49) ** 0.5


def test_the_formats_of_edm_and_edm2(tmp_path: Path) -> None:
    mu, sigma = np.array([1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 9.0]) + 0.5
    edm, edm2 = tmp_path / "cifar10.npz", tmp_path / "img512.pkl"
    np.savez(edm, mu=mu, sigma=sigma)
    other = {"mu": mu[:2], "sigma": sigma[:2, :2]}
    stats = {"num_images": 7, "fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": other}
    edm2.write_bytes(pickle.dumps(stats))
    for path, count in ((edm, None), (edm2, 7)):
        found = read_reference(path, Stand())
        assert found.moments.mu.tolist() == [1.0, 2.0, 3.0]
        assert np.array_equal(found.moments.sigma.numpy(), sigma)
        assert (found.count, found.kept) == (count, None)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mu, sigma = np.zeros(3), np.eye(3)
    np.savez("edm.npz", mu=mu, sigma=sigma)
    np.savez("two.npz", mu=mu[:2], sigma=sigma)
    np.savez("none.npz", images=mu)
    np.savez("nan.npz", mu=mu * np.nan, sigma=sigma)
    np.savez("skew.npz", mu=mu, sigma=np.triu(np.ones((3, 3))))
    np.savez("kept.npz", mu=mu, sigma=sigma, kept=np.zeros((2, 4)))
    np.savez("object.npz", mu=np.array([{}], dtype=object), sigma=sigma)
    Path("text.npz").write_text("hello")
    Path("text.pkl").write_text("hello")
    Path("other.pkl").write_bytes(pickle.dumps({"fd_dinov2": {"mu": mu, "sigma": sigma}}))
    made(tmp_path / "pixels.npz", Pixels())
    shapes = "inception-01234567 needs mu (3,) and sigma (3, 3)"
    cases = {
        "no.npz": "there is no file no.npz",
        "two.npz": f"two.npz: {shapes}, got (2,) and (3, 3)",
        "none.npz": f"none.npz: {shapes}, got None and None",
        "nan.npz": "nan.npz: mu holds values that are not finite",
        "skew.npz": "skew.npz: sigma is no covariance: it is not symmetric, or negative",
        "kept.npz": "kept.npz: kept has shape (2, 4), expected (K, 3)",
        "object.npz": "object.npz is no readable .npz file (the array 'mu' is made of",
        "text.npz": "text.npz is no readable .npz file (",
        "text.pkl": "text.pkl: not a pickle",
        "other.pkl": "other.pkl has statistics of fd_dinov2, none of fid for the features",
        "pixels.npz": "pixels.npz has statistics of 'pixels', but the features are "
        "'inception-01234567'",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            read_reference(Path(name), Stand())
    with pytest.raises(ValueError, match="does not say whose features it has, so they are Inc"):
        read_reference(Path("edm.npz"), Pixels())
