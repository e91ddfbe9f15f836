"""What `fewstep sample` writes of a model of prompts: grid, arrays, and a folder with settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import __version__, open_model
from fewstep.cli.sample_files import Asked, write_pictures
from fewstep.data.captioned_grid import captioned_grid
from fewstep.data.captions import open_captions
from fewstep.data.image_grid import grid, png
from fewstep.data.picture_set import load_pictures
from fewstep.diffusion.image_to_image import image_to_image
from fewstep.diffusion.pixels import to_uint8
from fewstep.teachers.diffusers.negative_prompt import with_negative
from tests.command import fewstep
from tests.conftest import Folders


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red cube, small\na blue ball\n")
    return file


def test_a_folder_of_pictures_with_their_settings(
    folders: Folders, tmp_path: Path, prompts: Path
) -> None:
    """Every prompt with every seed: the pictures of the Python call, and what made them."""
    pipe, out = folders("sd"), tmp_path / "made"
    flags = ("--steps", "4", "--guidance", "3", "--negative", "a red ball", "--seeds", "3,5")
    ask = ("sample", str(pipe), "--prompts", str(prompts), "--pairing", "every", *flags)
    done = fewstep(*ask, "--out", str(out))
    assert (done.code, done.out) == (0, f"{out}\n"), done.err
    assert "each of 2 prompts is made with each of 2 seeds: 4 pictures" in done.err
    teacher = with_negative(open_model(pipe), "a red ball").in_steps(4).guided(3.0)
    assert teacher.text is not None
    texts = ["a red cube, small"] * 2 + ["a blue ball"] * 2
    expected = to_uint8(teacher.sample([3, 5, 3, 5], cond=teacher.text(texts))).numpy()
    folder = open_captions(out)  # as a training set
    assert list(folder.captions) == texts
    assert list(folder.reader.names) == [f"0000{i}-seed-{s}.png" for i, s in enumerate([3, 5] * 2)]
    stored = load_pictures(folder.reader, torch.arange(4), (3, 16, 16), 16).take(torch.arange(4))
    assert np.array_equal(stored.permute(0, 2, 3, 1).numpy(), expected)
    with Image.open(out / "00002-seed-3.png") as picture:
        settings = json.loads(picture.text["fewstep"])  # type: ignore[attr-defined]
        lines = picture.text["parameters"].splitlines()  # type: ignore[attr-defined]
    assert len(settings.pop("model_sha256")) == 64
    assert settings.pop("sampling").startswith(
        "CFG(sampler=FewStep(t_init=999.0, steps=4, noise='ddim'"
    )
    assert settings == {
        **{"prompt": "a blue ball", "negative": "a red ball", "seed": 3, "size": "16x16"},
        **{"steps": 4, "calls": 8, "sampler": "DDIM", "guidance": 3.0, "model": "pipe"},
        "version": f"fewstep {__version__}",
    }
    assert lines == [
        "a blue ball",
        "Negative prompt: a red ball",
        "Steps: 4, Sampler: DDIM, CFG scale: 3, Seed: 3, Size: 16x16, Model: pipe, "
        f"Version: fewstep {__version__}",
    ]
    again = fewstep(*ask, "--out", str(out))
    assert again.code == 2
    assert str(out) in again.err


def test_a_grid_with_captions_and_without_and_arrays(
    folders: Folders, tmp_path: Path, prompts: Path
) -> None:
    pipe, out = folders("sd"), tmp_path / "grid.png"
    ask = ("sample", str(pipe), "--prompts", str(prompts), "--steps", "2", "--seeds", "3,5,8")
    teacher, texts = open_model(pipe).in_steps(2), ["a red cube, small", "a blue ball"]
    texts = [*texts, texts[0]]
    assert teacher.text is not None
    x = teacher.sample([3, 5, 8], cond=teacher.text(texts))
    assert fewstep(*ask, "--out", str(out)).code == 0
    assert out.read_bytes() == png(captioned_grid(x, texts, ["seed 3", "seed 5", "seed 8"]))
    assert fewstep(*ask, "--no-captions", "--out", str(out)).code == 0
    assert out.read_bytes() == png(grid(x))
    assert fewstep(*ask, "--out", str(tmp_path / "x.npz")).code == 0
    with np.load(tmp_path / "x.npz") as stored:
        assert stored["prompts"].tolist() == texts
        assert stored["seeds"].tolist() == [3, 5, 8]
        assert np.array_equal(stored["images"], to_uint8(x).numpy())


def test_from_a_picture(folders: Folders, tmp_path: Path) -> None:
    """The pictures of `image_to_image`, and what was done to a picture of another size."""
    pipe, picture, out = folders("sd"), tmp_path / "cat.jpg", tmp_path / "made"
    Image.effect_noise((40, 16), 90).save(picture)
    ask = ("sample", str(pipe), "--prompts", "a cat", "--steps", "10", "--seeds", "3,5")
    done = fewstep(*ask, "--from", str(picture), "--strength", "0.6", "--out", str(out))
    assert done.code == 0, done.err
    assert "cat.jpg is converted from L to RGB" in done.err
    assert "cat.jpg has 40x16 pixels and is reduced to 16x16, cut to its middle" in done.err
    from fewstep.data.start_picture import read_start

    teacher = open_model(pipe).in_steps(10)
    x0 = teacher.encode(read_start(picture, 16, 16)[0])
    x = image_to_image(teacher, x0, [3, 5], 0.6, prompts=["a cat"] * 2)
    with Image.open(out / "00001-seed-5.png") as made:
        assert np.array_equal(np.asarray(made), to_uint8(x)[1].numpy())
        settings = json.loads(made.text["fewstep"])  # type: ignore[attr-defined]
    assert (settings["steps"], settings["strength"], settings["from"]) == (6, 0.6, "cat.jpg")


REFUSED = {
    "no guidance": (("--negative", "blurry"), "give --guidance, too"),
    "half a start": (("--strength", "0.5"), "--from PICTURE and --strength S go together"),
    "no picture": (("--from", "x.png", "--strength", "0.5"), "there is no picture x.png"),
    "no step": (("--from", "a.png", "--strength", "0.1", "--steps", "4"), "leaves none of 4"),
    "two starts": (("--from", "a.png", "--strength", "1", "--walk", "3"), "different things"),
    "a jpeg": (("--out", "made.jpg"), "or is a folder, got made.jpg"),
    "a walk into a folder": (("--walk", "3", "--out", "made"), "not a folder"),
    "a walk of prompts": (("--prompts", "prompts.txt", "--walk", "3"), "prompts.txt has 2"),
    "pairs of a walk": (("--walk", "3", "--pairing", "every"), "without --walk and --vary"),
    "another pairing": (("--pairing", "each"), "--pairing is one of turn, every"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(
    folders: Folders, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("a.png")
    flags, told = REFUSED[name]
    done = fewstep("sample", str(folders("sd")), "--prompts", "a", "--seeds", "3,5", *flags)
    assert done.code == 2
    assert told in done.err
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "samples.png").exists()


def test_no_pictures_in_a_folder(tmp_path: Path) -> None:
    asked = Asked([1, 2], (), (), None, False, {})
    with pytest.raises(ValueError, match=r"are no pictures: let --out end in \.npz"):
        write_pictures(tmp_path / "points", iter([torch.zeros(2, 2)]), asked)
    assert not (tmp_path / "points").exists()
