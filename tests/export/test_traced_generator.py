"""A pipeline's student as a program: what it takes, what it gives, and what its card says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Folders

pytest.importorskip("diffusers")

import diffusers

from fewstep.diffusion.pixels import to_uint8
from fewstep.diffusion.samplers import FewStep
from fewstep.export.diffusers_pipeline import made_of
from fewstep.export.pt2_onnx import _onnx_use, _pt2_use, to_onnx, to_pt2
from fewstep.export.traced_generator import Program, described, examples
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.folder import open_folder
from fewstep.teachers.diffusers.load import with_text_and_vae
from tests.command import fewstep
from tests.export.test_diffusers_pipeline import ran, student


@pytest.mark.slow
def test_a_pipeline_as_a_program(folders: Folders, tmp_path: Path) -> None:
    """Embeddings and noise in, latents out; the graph of a U-Net takes up to 63 at once."""
    made = student(folders("sd_v"), tmp_path / "student", FewStep(625.0))
    assert to_pt2(made, tmp_path / "net.pt2") <= 1e-5
    extra = {"fewstep.json": ""}
    generator = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()
    assert json.loads(extra["fewstep.json"])["largest B"] == 63
    ours = with_text_and_vae(load_student(made))
    cond, z = ours.text(["a red cube", "a blue ball", ""]), torch.randn(3, 4, 8, 8)
    x = ours.sampler(ours.denoiser, z, cond)
    assert (generator({"z": z, **cond}) - x).abs().max() <= 1e-5 * x.abs().max()

    command = ("export", str(tmp_path / "student"), str(tmp_path / "whole.pt2"), "--to", "pt2")
    done = fewstep(*command, "--pictures")
    assert done.code == 0, done.err
    whole = torch.export.load(tmp_path / "whole.pt2", extra_files=extra).module()
    assert json.loads(extra["fewstep.json"])["what"].endswith("-> pictures in [-1, 1]")
    picture = whole({"z": z, **cond})
    assert picture.shape == (3, 3, 16, 16)
    assert (picture - ours.decode(x)).abs().max() <= 1e-5 * picture.abs().max()
    assert (picture[:1] - ours.decode(x[1:2])).abs().max() > 1e-2 * picture.abs().max()
    text = (tmp_path / "whole.pt2.md").read_text()
    assert "| output | pictures of shape [B, 3, 16, 16] in about [-1, 1]; clip them |" in text
    assert ran(text, tmp_path)["x"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "kind", ["sd", "sdxl", "sd3", "pixart", "sana", "flux", "flux2", "qwen_image"]
)
def test_the_card_of_a_program_makes_embeddings(
    folders: Folders, tmp_path: Path, kind: str
) -> None:
    """By the teacher's own pipeline; the output is the student's, and not that of no prompt."""
    made = load_student(student(folders(kind), tmp_path / "student", FewStep(1.0)))
    facts = described(made, examples(made, 1), None)
    code = _pt2_use(made, Path("net.pt2"), facts)
    assert "zeros" not in code
    code = code.replace('torch.export.load("net.pt2").module()', "program")  # spares a trace
    torch.manual_seed(0)
    names = ran(f"```python\n{code}```", tmp_path, program=Program(made).eval())
    assert names["pipe"].vae is None
    torch.manual_seed(0)
    z, ours = torch.randn(1, *made.shape), with_text_and_vae(made)
    off = [
        (names["x"] - ours.sampler(ours.denoiser, z, cond)).abs().max()
        for cond in (ours.text(["a prompt"]), None)
    ]
    assert off[0] <= 1e-5 * names["x"].abs().max() < off[1]
    assert facts["output"] == f"x_0, scaled latents of shape {['B', *made.shape]}".replace("'", "")


class Session:
    """What onnxruntime makes of a program, by the program itself."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert names == ["x"]
        return [self.program({k: torch.from_numpy(v) for k, v in feed.items()}).numpy()]


@pytest.mark.parametrize("kind", ["sd", "sd3", "sana"])
def test_the_card_of_an_onnx_program_ends_with_a_picture(
    folders: Folders, tmp_path: Path, kind: str
) -> None:
    """Decoded by the teacher's VAE, scaled and shifted as it asks: the student's to a level."""
    made = load_student(student(folders(kind), tmp_path / "student", FewStep(1.0)))
    code = _onnx_use(made, Path("net.onnx"), described(made, examples(made, 1), None))
    code = code.replace('onnxruntime.InferenceSession("net.onnx")', "session")
    torch.manual_seed(0)
    names = ran(f"```python\n{code}```", tmp_path, session=Session(Program(made).eval()))
    x = torch.from_numpy(names["x"])
    drawn = np.asarray(Image.open(tmp_path / "picture.png"), int)
    ours = with_text_and_vae(made)
    assert abs(drawn - to_uint8(ours.decode(x))[0].numpy()).max() <= 1
    assert abs(drawn - to_uint8(ours.decode(x / 2))[0].numpy()).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux2", "qwen_image", "sana"])
def test_programs_of_other_families(folders: Folders, tmp_path: Path, kind: str) -> None:
    """Stored, read again, equal for one sample and for three.

    Complex numbers are nothing that ONNX has.
    """
    made = student(folders(kind), tmp_path / "student", FewStep(1.0))
    assert to_pt2(made, tmp_path / "out.pt2") <= 1e-5
    if kind == "sana":  # whose attention adds 1e-15 to what may be 0
        assert to_onnx(made, tmp_path / "out.onnx") <= 1e-5
    if kind == "qwen_image":
        with pytest.raises(
            ValueError, match=r"cannot write this network \(.*complex.*use --to pt2"
        ):
            to_onnx(made, tmp_path / "out.onnx")
        assert not list(tmp_path.glob("out.onnx*"))


def test_prompts_of_their_own_lengths_have_no_graph(folders: Folders, tmp_path: Path) -> None:
    made = student(folders("z_image"), tmp_path / "student", FewStep(1.0))
    with pytest.raises(
        ValueError, match="of a ZImageTransformer2DModel have lengths of their own"
    ):
        to_pt2(made, tmp_path / "out.pt2")


def test_a_card_whose_teacher_is_gone(folders: Folders, tmp_path: Path) -> None:
    """Its inputs are examples again."""
    made = load_student(student(folders("sd"), tmp_path / "student", FewStep(625.0)))
    facts = described(made, examples(made, 1), None)
    for use in (_pt2_use, _onnx_use):
        assert '"prompt": prompt.float()' in use(made, Path("net"), facts)
    lost = replace(made, card={"teacher": {**made.card["teacher"], "folder": "/no/such"}})
    code = _pt2_use(lost, Path("net"), facts).replace('torch.export.load("net").module()', "net")
    assert '"prompt": torch.zeros(1, 8, 16)' in code
    names = ran(f"```python\n{code}```", tmp_path, net=Program(made).eval())
    assert names["x"].shape == (1, 4, 8, 8)


def test_parts_that_were_not_fetched_are_not_loaded(folders: Folders, tmp_path: Path) -> None:
    """A folder may name a safety checker that it has not; diffusers would look for it."""
    shutil.copytree(folders("sd"), tmp_path / "pipe")
    path = tmp_path / "pipe" / "model_index.json"
    index = json.loads(path.read_text())
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    path.write_text(json.dumps({**index, "safety_checker": checker}))
    code = made_of(open_folder(tmp_path / "pipe"), "vae")
    assert code.endswith("pipe\", vae=None, safety_checker=None)  # the teacher's folder")
    names = {"DiffusionPipeline": diffusers.DiffusionPipeline}
    exec(code, names)
    with pytest.raises(OSError, match="no file named"):
        exec(code.replace(", safety_checker=None", ""), names)
