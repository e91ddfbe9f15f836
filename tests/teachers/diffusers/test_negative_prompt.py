"""A negative prompt is what the stock pipeline makes of its `negative_prompt`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import Folders

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers

from fewstep.teachers.diffusers.adapter_base import adapter_of
from fewstep.teachers.diffusers.load import load_pipeline
from fewstep.teachers.diffusers.negative_prompt import with_negative
from fewstep.teachers.gaussian import Gaussian

NAMES = {
    "sd": ("", "prompt"),
    "sdxl": ("", "prompt", "", "pooled"),
    "sd3": ("", "prompt", "", "pooled"),
    "pixart": ("", "", "prompt", "mask"),
    "sana": ("", "", "prompt", "mask"),
}
"""Where the stock pipeline's encode_prompt returns the negative prompt's tensors."""


@pytest.mark.parametrize("kind", NAMES)
def test_as_the_stock_pipeline_encodes_it(folders: Folders, kind: str) -> None:
    folder = folders(kind)
    teacher = load_pipeline(folder)
    before = {name: b.clone() for name, b in adapter_of(teacher.denoiser).null().items()}  # type: ignore[union-attr]
    found = adapter_of(with_negative(teacher, "a red cube").denoiser).null()  # type: ignore[union-attr]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    more: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1}
    if kind == "sd3":
        more |= {"prompt_2": None, "prompt_3": None}
    with torch.no_grad():
        out = pipe.encode_prompt(
            "a cat",
            do_classifier_free_guidance=True,
            negative_prompt="a red cube",
            **more,
        )
    stock = {name: row for name, row in zip(NAMES[kind], out, strict=True) if name}
    assert found.keys() == stock.keys()
    for name, row in stock.items():
        assert torch.allclose(found[name], row[0].float(), atol=1e-6), name
    assert any(not torch.allclose(found[name], before[name]) for name in found)


def test_guidance_leads_away_from_it(folders: Folders) -> None:
    """f_2 = 2 f(c) - f(negative), whose null prompt is the negative one: the latents of stock."""
    teacher = load_pipeline(folders("sd"))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 261.0])
    cond, away = teacher.text(["a cat", "a dog"]), teacher.text(["a red cube"] * 2)  # type: ignore[misc]
    without = teacher.denoiser(x, t, None)
    expected = teacher.denoiser(x, t, away)
    found = with_negative(teacher, "a red cube").denoiser(x, t, None)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, without, atol=1e-3)
    assert torch.allclose(teacher.denoiser(x, t, cond), teacher.denoiser(x, t, cond))


def test_refusals(folders: Folders) -> None:
    from fewstep.diffusion.generator import Generator
    from fewstep.diffusion.noise_path import VE
    from fewstep.diffusion.samplers import FewStep

    points = Generator(Gaussian(torch.zeros(2), torch.eye(2), VE()), FewStep(2.0), (2,))
    with pytest.raises(ValueError, match="this model takes no prompts"):
        with_negative(points, "a")
    with pytest.raises(ValueError, match="the negative prompt is empty"):
        with_negative(load_pipeline(folders("sd")), "  ")
