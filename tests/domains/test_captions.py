"""Pictures with captions, encoded once: each latent beside its own caption, by value.

The VAE and the text encoders are the pipeline's own; latents are kept in half precision.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import Folders

pytest.importorskip("diffusers")

from fewstep.config import parse
from fewstep.data import embeddings
from fewstep.data.captions import open_captions
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Method
from fewstep.domains.captions import Captions
from fewstep.recipes.text_to_image import t2i_flow
from fewstep.runs.runner import Step, execute
from fewstep.teachers.diffusers.load import load_pipeline
from tests.command import fewstep, tree

pytestmark = pytest.mark.slow

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
    teacher = load_pipeline(folders("sd"))
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
    teacher = load_pipeline(folders("sd"))
    first = source(teacher)(Draws.range(0, 3, 0))
    kept = tree(Path("photos.encoded"))
    again = source(load_pipeline(folders("sd")))(Draws.range(0, 3, 0))
    assert torch.equal(first.x0, again.x0)
    assert tree(Path("photos.encoded")) == kept
    Image.new("RGB", (99, 61), (1, 2, 3)).save(photos / "red.png")
    changed = source(load_pipeline(folders("sd")))
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
    "no folder": (
        shutil.rmtree,
        r"there is no folder photos of pictures; name one with --domain \"Captions\('FOLDER'\)\"",
    ),
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
        source(load_pipeline(folders("sd")))
    assert not [*Path("photos.encoded").rglob("shard-*")]  # nothing was encoded


TINY = ("--batch", "2", "--accumulate", "1", "--steps", "1")
BETAS = ("Whole(20, 979)", "Power(2, -2)", "FewStep(625)", "FewStep(999, 4, unit=True)")
FLOW = ("LogitNormal(0.7, 1.6)", "Power(0, -2)", "FewStep(1.0)", "FewStep(1.0, 4)")


def adversarial(times: str, weight: str, one: str, four: str) -> dict[str, str]:
    """SiDA, few-step SiD with its Diffusion-GAN, and DMD2, as on a command line."""
    critic = f"Critic({times}, {weight}, SNR(), average='sample'"
    told = f"times={times}, gan_weight=SNR(), gan=0.001, fake={critic})"
    return {
        "SiDA": f"SiDA({one}, {told})",
        "few-step SiD": f"SiDA({four}, {told}, guidance=ZeroCFG())",
        "DMD2": f"DMD2({four}, {times}, fake={critic}, pool='learned'), ratio=2)",
    }


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_adversarial_methods_learn_from_captioned_pictures(
    folders: Folders, photos: Path, kind: str
) -> None:
    """On the command line, on betas and on a flow, with a data-free method for comparison.

    All are given what the first has encoded; a changed folder is another run.
    """
    shutil.copytree(folders(kind), "pipe")
    recipe, told = ("t2i", BETAS) if kind == "sd" else ("t2i_flow", FLOW)
    base = ("distill", recipe, "--teacher", "pipe", *TINY)
    base = (*base, "--domain", "Captions('photos', check=False)")
    kept: dict[str, bytes | None] = {}
    for name, method in adversarial(*told).items():
        done = fewstep(*base, "--method", method, "--out", name)
        assert done.code == 0, done.err
        last = json.loads(Path(name, "log.jsonl").read_text().splitlines()[-1])
        assert last["skipped"] == 0
        assert last["fake/discriminator"] > 0
        assert last["student/gan_loss"] > 0
        kept = kept or tree(Path("photos.encoded"))
        assert tree(Path("photos.encoded")) == kept
    assert fewstep(*base, "--out", "free").code == 0
    (photos / "metadata.jsonl").write_text(
        (photos / "metadata.jsonl").read_text().replace("a red", "a dark red")
    )
    done = fewstep(*base, "--out", "free")
    assert (done.code, done.out) == (2, "")
    assert "in use by a run with other settings (run.domain.sha256 was" in done.err


def test_an_encoding_that_was_stopped_goes_on(
    folders: Folders, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first of three shards: the next run encodes the other pictures alone."""
    monkeypatch.setattr(embeddings, "SHARD", 1)
    teacher, heard = load_pipeline(folders("sd")), list[Tensor]()

    def encode(x: Tensor) -> Tensor:
        if len(heard) == 1:
            heard.append(x)
            raise KeyboardInterrupt
        heard.append(x)
        return teacher.encode(x)

    with pytest.raises(KeyboardInterrupt):
        source(replace(teacher, encode=encode))
    found = source(replace(teacher, encode=encode)).at(torch.arange(3))
    assert len(heard) == 4
    assert torch.equal(heard[1], heard[2])
    assert len({float(x.sum()) for x in heard}) == 3
    shutil.rmtree("photos.encoded")
    assert torch.equal(source(teacher).at(torch.arange(3)), found)


def test_a_run_on_pictures_goes_on_to_the_same_bits(folders: Folders, photos: Path) -> None:
    """Stopped after one step of three, in the middle of an epoch of three pictures."""
    method = parse(adversarial(*FLOW)["DMD2"], Method)
    told: Any = {"domain": Captions("photos", check=False), "batch": 4, "accumulate": 1}
    run = replace(t2i_flow(), method=method, steps=3, **told)

    def end(out: str, *stops: bool) -> dict[str, Tensor]:
        for stop in stops:
            work = execute(run, Path(out), recipe="t2i_flow", teacher=str(folders("sd3")))
            for progress in work:
                if stop and isinstance(progress, Step):
                    assert progress.step == 1
                    work.close()
        return load_file(Path(out) / "checkpoints" / "step-00000003" / "nets.safetensors")

    whole, again = end("whole", False), end("stopped", True, False)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], t) for key, t in again.items())


def test_the_teacher_is_examined_on_the_pictures(folders: Folders, photos: Path) -> None:
    """A random network does not denoise their latents; without pictures a method says so."""
    shutil.copytree(folders("sd"), "pipe")
    method = adversarial(*BETAS)["SiDA"]
    base = ("distill", "t2i", "--teacher", "pipe", "--method", method, "--out", "run")
    done = fewstep(*base, "--domain", "Captions('photos')")
    assert done.code == 2
    assert "the teacher does not denoise as its files say" in done.err
    assert "say --domain \"Captions('FOLDER')\"" in fewstep(*base, "--domain", "Captions()").err
    Path("prompts.txt").write_text("a red ball")
    done = fewstep(*base, "--domain", "Prompts('prompts.txt')")
    assert "choose a method without data, or say --domain \"Captions('FOLDER')\"" in done.err
