"""The two phases of DMD2 on Stable Diffusion, as their recipes are run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")

from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.load import load_pipeline
from tests.command import fewstep
from tests.conftest import Folders
from tests.domains.test_captions import photos

pytestmark = pytest.mark.slow

__all__ = ["photos"]

TINY = ("--teacher", "pipe", "--batch", "2", "--accumulate", "1", "--steps", "1")


def test_the_second_phase_starts_from_the_first_ones_student(
    folders: Folders, photos: Path
) -> None:
    """At almost no rate it stays where it began; its fake score is the teacher and a head."""
    shutil.copytree(folders("sd"), "pipe")
    Path("prompts.txt").write_text("a red ball\na blue ball\n")
    base = ("distill", "dmd2_sd15", *TINY, "--optim.lr", "1e-2", "--out", "first")
    done = fewstep(*base, "--domain", "Prompts('prompts.txt', check=False)")
    assert done.code == 0, done.err
    pictures = ("--domain", "Captions('photos', check=False)", "--optim.lr", "1e-30")
    done = fewstep("distill", "dmd2_sd15_gan", *TINY, *pictures, "--init", "first", "--out", "gan")
    assert done.code == 0, done.err
    teacher = load_pipeline("pipe").denoiser.state_dict()
    first, second = (load_student(run).denoiser.state_dict() for run in ("first", "gan"))
    assert second.keys() == first.keys() == teacher.keys()
    torch.testing.assert_close(second, first, rtol=0, atol=1e-28)
    assert max(float((first[name] - old).abs().max()) for name, old in teacher.items()) > 5e-3
    nets = load_file(next(Path("gan/checkpoints").glob("step-*")) / "nets.safetensors")
    heads = {name for name in nets if name.startswith("fake.head.")}
    assert heads
    fake = {name[9:]: t for name, t in nets.items() if name.startswith("fake.net.")}
    torch.testing.assert_close(fake, dict(teacher), rtol=0, atol=1e-28)
    assert len(nets) == len(first) + len(fake) + len(heads)
