"""Pictures on disk: every kind of file gives the same bits; sample n depends on n and the seed."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.config import decode, encode, parse
from fewstep.data import picture_set
from fewstep.data.batches import Images, epoch_order
from fewstep.data.images import fit, png, standard
from fewstep.data.picture_set import load_pictures, spread_labels
from fewstep.data.readers import reader_of
from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Source
from fewstep.domains.pictures import Pictures
from fewstep.nets.mlp import MLP
from tests.picture_files import as_folder, as_npz, as_zip, encoded, files, labelled, noise

COUNT, SIZE = 23, 8


def model(channels: int = 3, classes: int = 5, size: int = SIZE) -> Model:
    return Model(MLP(), (channels, size, size), classes)


@pytest.fixture(params=["folder", "zip", "deflated", "nhwc", "nchw", "nhw"])
def same(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """A set in one of the forms, and what is in it."""
    kind = request.param
    x = noise(COUNT, SIZE, 1 if kind == "nhw" else 3)
    labels = np.random.default_rng(1).integers(0, 5, COUNT)
    content = labelled(files(x), labels)
    if kind == "folder":
        path = as_folder(tmp_path / "set", {**content, ".DS_Store": b"?", "notes.txt": b"hi"})
    elif kind in ("zip", "deflated"):
        path = as_zip(tmp_path / "set.zip", {**content, "__MACOSX/._a.png": b"?"}, 8)
    else:
        axes = {"nchw": (0, 3, 1, 2)}.get(kind, (0, 1, 2, 3))
        arrays = x[..., 0] if kind == "nhw" else x.transpose(axes)
        path = as_npz(tmp_path / "set.npz", images=arrays, labels=labels, extra=np.arange(3))
    return str(path), x, labels


def pictures_of(x: np.ndarray) -> torch.Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) in [-1, 1]: the definition."""
    return torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("memory", [0, picture_set.MEMORY], ids=["decoded", "held"])
def test_every_form_is_the_same_set(
    same: tuple[str, np.ndarray, np.ndarray],
    memory: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Equal to `Images` of the same arrays in every bit, held in memory or not."""
    monkeypatch.setattr(load_pictures, "__defaults__", (0, memory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, x, labels = same
    source = Pictures(path).source(model(x.shape[3]), data_free=False)
    plain = Images(pictures_of(x), torch.from_numpy(labels))
    draws = Draws.range(5, 3 * COUNT, seed=2)
    got, wanted = source(draws), plain(draws)
    assert torch.equal(got.x0, wanted.x0)
    assert torch.equal(got.cond, wanted.cond)
    assert torch.equal(got.z, wanted.z)
    parts = [source(Draws.range(i, 3, seed=2)).x0 for i in range(5, 5 + 3 * COUNT, 3)]
    assert torch.equal(torch.cat(parts), got.x0)
    assert not torch.equal(source(Draws.range(5, 3 * COUNT, seed=3)).x0, got.x0)
    assert (tmp_path / "cache").exists() == (memory == 0)


def test_labels_alone_are_those_of_the_pictures(
    same: tuple[str, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data-free: same noise, same labels in the same order, as frequent as in the data."""

    def never(*_: object) -> None:
        raise AssertionError("a picture was read")

    path, x, labels = same
    draws = Draws.range(0, 2 * COUNT, seed=4)
    batch = Pictures(path).source(model(x.shape[3]), data_free=False)(draws)
    monkeypatch.setattr("fewstep.data.readers.decode", never)
    monkeypatch.setattr("fewstep.data.readers.head", never)
    monkeypatch.setattr("fewstep.data.npz.images", never)
    alone = Pictures(path).source(model(x.shape[3]), data_free=True)(draws)
    assert alone.x0 is None
    assert torch.equal(alone.cond, batch.cond)
    assert torch.equal(alone.z, batch.z)
    counts = torch.bincount(alone.cond, minlength=5)
    assert counts.tolist() == (2 * np.bincount(labels, minlength=5)).tolist()
    with pytest.raises(AssertionError, match="a picture was read"):
        Pictures(path).source(model(x.shape[3]), data_free=False)


def test_without_labels(tmp_path: Path) -> None:
    """Uniform labels on request, or where no pictures are at hand: 4,000, four errors."""
    path = str(as_zip(tmp_path / "x.zip", files(noise(4, SIZE, 3))))
    none = Pictures(path).source(model(classes=0), data_free=False)(Draws.range(0, 4))
    assert none.cond is None
    assert none.x0 is not None
    for domain in (Pictures(path, labels=False), Pictures()):
        cond = domain.source(model(), data_free=True)(Draws.range(0, 4000)).cond
        share = torch.bincount(cond, minlength=5) / 4000
        assert float((share - 0.2).abs().max()) < 4 * math.sqrt(0.2 * 0.8 / 4000)
    assert Pictures().source(model(classes=0), data_free=True)(Draws.range(0, 2)).cond is None
    assert Pictures(path).sample_metrics() is None


def test_flips_are_of_half_the_samples_and_of_nothing_else(tmp_path: Path) -> None:
    x = noise(50, SIZE, 3)
    path = str(as_npz(tmp_path / "x.npz", images=x))
    draws = Draws.range(0, 2000, seed=1)
    plain = Pictures(path).source(model(classes=0), False)(draws).x0
    flipped: Source = Pictures(path, flip=True).source(model(classes=0), False)
    got = flipped(draws).x0
    mirrored = draws.uniform("flip") < 0.5
    assert abs(float(mirrored.double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(2000)
    assert torch.equal(got[~mirrored], plain[~mirrored])
    assert torch.equal(got[mirrored], plain[mirrored].flip(-1))
    assert torch.equal(flipped(Draws.range(7, 9, seed=1)).x0, got[7:16])


def test_a_part_is_spread_evenly(tmp_path: Path) -> None:
    assert spread_labels(4, 10).tolist() == [0, 2, 5, 7]
    assert spread_labels(0, 3).tolist() == spread_labels(9, 3).tolist() == [0, 1, 2]
    x, labels = noise(10, SIZE, 3), np.arange(10)
    path = str(as_npz(tmp_path / "x.npz", images=x, labels=labels))
    part = Pictures(path, max_items=4).source(model(classes=10), False)
    batch = part(draws := Draws.range(0, 8))
    assert torch.equal(batch.cond, torch.tensor([0, 2, 5, 7])[epoch_order(draws, 4)])
    assert torch.equal(batch.x0, pictures_of(x)[batch.cond])


def test_class_folders(tmp_path: Path) -> None:
    """Labels by the order of names; none where pictures lie beside the folders."""
    x = noise(4, SIZE, 3)
    names = ("cat/2.png", "cat/1.png", "ant/x/0.png", "dog/9.PNG")
    folder = as_folder(tmp_path / "a", dict(zip(names, map(encoded, x), strict=True)))
    for path in (
        folder,
        as_zip(tmp_path / "a.zip", dict(zip(names, map(encoded, x), strict=True))),
    ):
        reader = reader_of(path)
        assert reader.names == ["ant/x/0.png", "cat/1.png", "cat/2.png", "dog/9.PNG"]
        assert reader.labels.tolist() == [0, 1, 1, 2]
        assert reader.classes == ["ant", "cat", "dog"]
        assert np.array_equal(np.asarray(reader.image(2)), x[0])
    (folder / "beside.png").write_bytes(encoded(x[0]))
    assert reader_of(folder).labels is None
    null = as_folder(tmp_path / "b", {"0/a.png": encoded(x[0]), "1/a.png": encoded(x[1])})
    (null / "dataset.json").write_text('{"labels": null}')
    assert reader_of(null).labels is None


def test_center_crop_and_resize() -> None:
    """A checkerboard's middle; Lanczos and box of a constant; halves are means of 2x2."""
    x = np.zeros((6, 11, 3), np.uint8)
    x[:, 2:8] = 200
    assert np.array_equal(np.asarray(fit(Image.fromarray(x), 6)), x[:, 2:8])
    assert np.array_equal(np.asarray(fit(Image.fromarray(x), 6, "dhariwal")), x[:, 2:8])
    tall = Image.fromarray(x.transpose(1, 0, 2))
    assert np.asarray(fit(tall, 3)).tolist() == np.full((3, 3, 3), 200).tolist()
    y = noise(1, 16, 1)[0, ..., 0]
    means = y.reshape(8, 2, 8, 2).astype(float).mean((1, 3))
    got = np.asarray(fit(Image.fromarray(y), 8, "dhariwal")).astype(float)
    assert np.abs(got - means).max() <= 1  # Pillow rounds twice, rows and columns
    plain = np.asarray(Image.fromarray(y).resize((8, 8), Image.Resampling.LANCZOS))
    assert np.array_equal(np.asarray(fit(Image.fromarray(y), 8)), plain)
    assert np.abs(plain.astype(float) - means).max() > 2


def test_resolution_brings_any_picture_to_size(tmp_path: Path) -> None:
    x = noise(1, 20, 3)[0, :14]
    content = {"a.jpg": encoded(x, "JPEG"), "b.webp": encoded(x, "WEBP", lossless=True)}
    content |= {"c.png": encoded(x[..., 0]), "d.png": encoded(x)}
    path = str(as_folder(tmp_path / "x", content))
    source = Pictures(path, resolution=SIZE).source(model(classes=0), False)
    got = source.pictures.take(torch.arange(4))
    wanted = np.asarray(fit(Image.fromarray(x), SIZE)).transpose(2, 0, 1)
    assert np.array_equal(got[3].numpy(), wanted)
    assert np.array_equal(got[1].numpy(), wanted)  # lossless
    assert np.abs(got[0].numpy().astype(float) - wanted).mean() < 30  # JPEG of noise
    assert torch.equal(got[2, 0], got[2, 1])


def test_what_is_transparent_lies_on_white() -> None:
    x = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    palette = io.BytesIO()
    Image.fromarray(x).quantize(4).save(palette, "PNG")
    for image in (Image.fromarray(x), Image.open(palette)):
        assert np.asarray(standard(image)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert np.asarray(standard(bits)).tolist() == [[0, 255]]


def test_uncompressed_png_is_exact() -> None:
    x = noise(1, 9, 3)[0]
    data = png(Image.fromarray(x))
    assert len(data) > x.size
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), x)


def test_the_domain_as_text() -> None:
    domain = Pictures("my.zip", flip=True)
    assert parse("Pictures('my.zip', flip=True)") == decode(encode(domain)) == domain
