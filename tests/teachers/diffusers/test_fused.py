"""A LoRA file fused into its pipeline: a fine-tune that can be a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from fewstep.export.lora import FILE, to_kohya, to_lora
from fewstep.runs.teacher import load_finite
from fewstep.storage.files import read_json
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.fused import fuse
from fewstep.teachers.diffusers.load import load_pipeline
from tests.conftest import Folders
from tests.export.test_lora import adapted

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_the_folder_holds_base_and_adapters(folders: Folders, tmp_path: Path, kind: str) -> None:
    """Its weights are W + B A; text encoders, VAE and schedule are the base's."""
    base = folders(kind)
    student = adapted(base, tmp_path / "student", kind)
    to_lora(student, tmp_path / "lora")
    out = fuse(base, tmp_path / "lora" / FILE, tmp_path / "out")
    found, before = load_finite(str(out)), load_pipeline(base)
    expected = load_student(student).denoiser.state_dict()
    moved = 0
    for name, tensor in found.denoiser.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
        moved += not torch.equal(tensor, before.denoiser.state_dict()[name])
    assert moved > 2
    assert found.model == before.model
    assert found.card["text"] == before.card["text"]
    assert found.card["vae"] == before.card["vae"]
    assert found.sampler == before.sampler


def test_scale_kohya_and_a_second_call(folders: Folders, tmp_path: Path) -> None:
    """Half the scale is half the change; the same again is left as it is, other things refused."""
    base = folders("sd")
    student = adapted(base, tmp_path / "student", "sd")
    file = tmp_path / "user.safetensors"
    to_kohya(student, file)
    whole = fuse(base, file, tmp_path / "whole")
    half = fuse(base, file, tmp_path / "half", 0.5)
    nets = [load_pipeline(path).denoiser.state_dict() for path in (base, half, whole)]
    for name, first in nets[0].items():
        torch.testing.assert_close(
            2 * (nets[1][name] - first), nets[2][name] - first, rtol=1e-3, atol=1e-5
        )
    when = (whole / "fused.json").stat().st_mtime_ns
    assert fuse(base, file, whole) == whole
    assert (whole / "fused.json").stat().st_mtime_ns == when
    with pytest.raises(ValueError, match="is in use; remove it, or choose another --out"):
        fuse(base, file, whole, 0.7)
    assert set(read_json(whole / "fused.json")) == {"base", "lora", "scale"}


def test_what_is_no_adapter_of_it_is_refused(folders: Folders, tmp_path: Path) -> None:
    base, out = folders("sd"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"there is no file .*; name the .safetensors file"):
        fuse(base, tmp_path / "none.safetensors", out)
    save_file({"unet.x.lora_A.weight": torch.zeros(2, 3)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"odd.safetensors (is no LoRA of|changes no weight of)"):
        fuse(base, tmp_path / "odd.safetensors", out)
    student = adapted(folders("sd3"), tmp_path / "student", "sd3")
    to_lora(student, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"(is no LoRA of|changes no weight of)"):
        fuse(base, tmp_path / "lora" / FILE, out)
    assert not out.exists()
