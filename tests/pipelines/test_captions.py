"""Pictures with captions, encoded once: each latent beside its own caption, by value.

The VAE and the text encoders are the pipeline's own; latents are kept in half precision.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.pipelines.conftest import Folders

pytest.importorskip("diffusers")

from fewstep.core import Batch
from fewstep.data.captions import open_captions
from fewstep.draws import Draws
from fewstep.generator import Generator
from fewstep.pipelines.load import load
from fewstep.recipes.captions import Captions
from tests.end_to_end.command import fewstep, tree

COLOURS = {"red": (200, 30, 30), "blue": (20, 40, 220), "green": (10, 160, 60)}
SIDE = 16


def write(folder: Path) -> Path:
    """Three plain pictures of three sizes, one of them in a folder below, with their captions."""
    lines = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        path = folder / ("more" if name == "green" else "") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + 8 * number, 24), colour).save(path)
        text = {"file_name": path.relative_to(folder).as_posix(), "text": f"a {name} ball"}
        lines.append(json.dumps(text))
    (folder / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    return folder


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "photos")


def source(teacher: Generator, data_free: bool = False) -> Any:
    assert teacher.model is not None
    return Captions("photos", check=False).source_for(teacher, teacher.model, data_free)


def test_latents_stand_beside_their_captions(folders: Folders, photos: Path) -> None:
    """Of all samples of an epoch; the middle squares of plain pictures are plain."""
    teacher = load(folders("sd"))
    batch: Batch = source(teacher)(Draws.range(0, 6, 0))
    assert batch.x0 is not None
    found = set()
    for x0, prompt in zip(batch.x0, batch.cond["prompt"], strict=True):
        for name, colour in COLOURS.items():
            plain = torch.tensor(colour).float()[:, None, None].expand(3, SIDE, SIDE)
            latent = teacher.encode(plain[None] / 127.5 - 1)[0]
            spoken = teacher.text([f"a {name} ball"])["prompt"][0]
            if torch.allclose(x0, latent, atol=2e-3 * float(latent.abs().max())):
                assert torch.allclose(prompt, spoken, atol=2e-3)
                found.add(name)
    assert found == set(COLOURS)
    free = source(teacher, data_free=True)(Draws.range(0, 6, 0))
    assert free.x0 is None
    assert torch.equal(free.cond["prompt"], batch.cond["prompt"])


def test_what_is_encoded_is_kept(folders: Folders, photos: Path) -> None:
    """A second run encodes nothing; a picture that is another now, that one alone."""
    teacher = load(folders("sd"))
    first = source(teacher)(Draws.range(0, 3, 0))
    kept = tree(Path("photos.encoded"))
    again = source(load(folders("sd")))(Draws.range(0, 3, 0))
    assert torch.equal(first.x0, again.x0)
    assert tree(Path("photos.encoded")) == kept
    Image.new("RGB", (99, 61), (1, 2, 3)).save(photos / "red.png")
    changed = source(load(folders("sd")))
    new = {path: part for path, part in tree(Path("photos.encoded")).items() if path not in kept}
    assert len(new) == 1
    keys = open_captions(photos).keys
    assert len({line for line in keys if line.startswith("red.png")}) == 1
    x = changed.at(torch.arange(3))
    plain = torch.tensor([1.0, 2, 3])[:, None, None].expand(3, SIDE, SIDE) / 127.5 - 1
    wanted = teacher.encode(plain[None])[0]
    row = [line.split()[0] for line in keys].index("red.png")
    assert torch.allclose(x[row], wanted, atol=2e-3 * float(wanted.abs().max()))


def metadata(*lines: object) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        text = "\n".join(json.dumps(line) for line in lines)
        (folder / "metadata.jsonl").write_text(text)

    return act


def cut(folder: Path) -> None:
    path = folder / "blue.png"
    path.write_bytes(path.read_bytes()[:-30])


RED = {"file_name": "red.png", "text": "a red ball"}
WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "no captions": (
        lambda folder: (folder / "metadata.jsonl").unlink(),
        "photos holds no metadata.jsonl, with a line for each picture",
    ),
    "a line too many": (
        metadata(RED, {"file_name": "../x.png", "text": "x"}),
        r"metadata.jsonl cannot be used; 1 lines without a picture: line 2 \(../x.png\)",
    ),
    "a line without a name": (
        metadata({"text": "x"}),
        r"lines without a picture: line 1 \(None\)",
    ),
    "a line without a caption": (
        metadata({"file_name": "red.png"}),
        "line 1 has none of prompt, caption, text; it has file_name",
    ),
    "twice": (metadata(RED, RED), "1 pictures with two captions: red.png"),
    "nothing said": (
        metadata({"file_name": "red.png", "caption": " "}),
        "1 pictures with an empty caption: red.png",
    ),
    "pictures left over": (
        metadata(RED),
        "2 pictures without a caption: blue.png, more/green.png",
    ),
    "a damaged picture": (cut, "photos cannot be used; 1 damaged: blue.png"),
    "no JSON": (
        lambda folder: (folder / "metadata.jsonl").write_text("red") and None,
        "line 1 is not JSON",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_match_is_named(folders: Folders, photos: Path, case: str) -> None:
    change, message = WRONG[case]
    change(photos)
    with pytest.raises(ValueError, match=message):
        source(load(folders("sd")))


TIMES, CRITIC = "Whole(20, 979)", "Critic(Whole(20, 979), Power(2, -2), SNR(), average='sample')"
METHODS = {
    "SiDA": f"SiDA(FewStep(625), 1.0, {TIMES}, fake={CRITIC}, gan_weight=SNR(), gan=0.001)",
    "DMD2": f"DMD2(FewStep(999, 4, unit=True), {TIMES}, fake={CRITIC}, ratio=2)",
}


def test_adversarial_methods_learn_from_captioned_pictures(folders: Folders, photos: Path) -> None:
    """On the command line: two methods and a data-free one; a changed folder is another run."""
    shutil.copytree(folders("sd"), "pipe")
    domain = "Captions('photos', check=False)"
    tiny = ("--batch", "4", "--accumulate", "2", "--steps", "2", "--draw-every", "2")
    base = ("distill", "t2i", "--teacher", "pipe", "--domain", domain, *tiny)
    for name, method in METHODS.items():
        done = fewstep(*base, "--method", method, "--out", name)
        assert done.code == 0, done.err
        last = json.loads(Path(name, "log.jsonl").read_text().splitlines()[-1])
        assert last["skipped"] == 0
        assert last["fake/discriminator"] > 0
        assert last["student/fooling"] > 0
    assert fewstep(*base, "--out", "free").code == 0
    (photos / "metadata.jsonl").write_text(
        (photos / "metadata.jsonl").read_text().replace("a red", "a dark red")
    )
    done = fewstep(*base, "--out", "free")
    assert (done.code, done.out) == (2, "")
    assert "in use by a run with other settings (run.domain.sha256 was" in done.err


def test_the_teacher_is_examined_on_the_pictures(folders: Folders, photos: Path) -> None:
    """A random network does not denoise their latents; without pictures a method says so."""
    shutil.copytree(folders("sd"), "pipe")
    base = ("distill", "t2i", "--teacher", "pipe", "--method", METHODS["SiDA"], "--out", "run")
    done = fewstep(*base, "--domain", "Captions('photos')")
    assert done.code == 2
    assert "the teacher does not denoise as its files say" in done.err
    assert "say --domain \"Captions('FOLDER')\"" in fewstep(*base, "--domain", "Captions()").err
    Path("prompts.txt").write_text("a red ball")
    done = fewstep(*base, "--domain", "Prompts('prompts.txt')")
    assert "choose a method without data, or say --domain \"Captions('FOLDER')\"" in done.err
