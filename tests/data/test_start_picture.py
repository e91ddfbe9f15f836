"""A picture to start from: what each file becomes, what is said of it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.start_picture import read_start
from tests.picture_files import noise


def saved(path: Path, image: Image.Image, **more: object) -> Path:
    image.save(path, **more)  # type: ignore[arg-type]
    return path


def test_a_picture_of_the_right_size_is_itself(tmp_path: Path) -> None:
    array = noise(1, 16, 3)[0]
    x, notes = read_start(saved(tmp_path / "a.png", Image.fromarray(array)), 16, 16)
    assert torch.equal(x, torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1)
    assert notes == []


def test_other_pictures_are_brought_to_it_aloud(tmp_path: Path) -> None:
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    cases = {
        "large.png": (Image.new("RGB", (64, 32)), "64x32 pixels and is reduced to 16x16, cut to"),
        "small.png": (Image.new("RGB", (4, 4)), "has 4x4 pixels and is enlarged to 16x16"),
        "grey.png": (Image.new("L", (16, 16), 51), "grey.png is converted from L to RGB"),
        "clear.png": (half, "clear.png is converted from RGBA to RGB"),
        "print.jpg": (Image.new("CMYK", (16, 16)), "print.jpg is converted from CMYK to RGB"),
    }
    for name, (image, told) in cases.items():
        x, notes = read_start(saved(tmp_path / name, image), 16, 16)
        assert x.shape == (1, 3, 16, 16)
        assert told in "; ".join(notes), name
    x, _ = read_start(tmp_path / "grey.png", 16, 16)
    assert torch.allclose(x, torch.tensor(51 / 127.5 - 1))
    x, _ = read_start(tmp_path / "clear.png", 16, 16)  # on white
    assert torch.allclose(x[0, :, 0, 0], torch.tensor([255.0, 127, 127]) / 127.5 - 1)
    x, notes = read_start(tmp_path / "large.png", 16, 16, channels=1)
    assert x.shape == (1, 1, 16, 16)
    assert "converted from RGB to L" in notes[0]
    turned = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    x, notes = read_start(saved(tmp_path / "turned.png", turned, exif=exif), 3, 4, 1)
    assert "turned upright" in notes[0]
    assert torch.equal(x[0, 0, 0], torch.tensor([8.0, 4, 0]) / 127.5 - 1)


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    whole = saved(tmp_path / "a.png", Image.fromarray(noise(1, 32, 3)[0])).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:500])
    saved(tmp_path / "deep.png", Image.new("I;16", (8, 8)))
    saved(tmp_path / "old.bmp", Image.new("RGB", (8, 8)))
    cases = {
        "gone.png": "there is no picture",
        "text.png": "not a whole picture; PNG, JPEG, WEBP are read",
        "cut.png": "not a whole picture",
        "deep.png": "of more than 8 bits",
        "old.bmp": "PNG, JPEG, WEBP are read",
    }
    for name, told in cases.items():
        with pytest.raises(ValueError, match=told):
            read_start(tmp_path / name, 16, 16)
    with pytest.raises(ValueError, match="there is no picture"):
        read_start(tmp_path, 16, 16)
