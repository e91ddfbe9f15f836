"""img2img: which calls are made, what they start from, and stock diffusers' own answer."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.image_to_image import image_to_image, steps_left
from fewstep.diffusion.linear_solver import LinearSolver
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.sampler_changes import last_calls
from fewstep.diffusion.samplers import Ancestral, FewStep, Heun, MultiStep
from fewstep.diffusion.time_distributions import Karras, Shifted
from fewstep.diffusion.types import Sampler
from fewstep.teachers.gaussian import Gaussian
from tests.conftest import Folders


@pytest.mark.parametrize(
    ("sampler", "path", "strength", "times"),
    [
        (FewStep(999.0, 4, unit=True), VP(), 0.5, (499.0, 249.0)),
        (FewStep(999.0, 4), VP(), 0.74, (499.0, 249.0)),
        (FewStep(999.0, 4), VP(), 1.0, (999.0, 749.0, 499.0, 249.0)),
        (FewStep(625.0), VP(), 1.0, (625.0,)),
        (FewStep(2.0, 4), VE(), 0.5, (1.0, 0.5)),
        (FewStep(2.0, 4), VE(), 0.51, (1.5, 1.0, 0.5)),
        (FewStep(2.0, 2, "fixed"), VE(), 0.5, (1.0,)),
        (FewStep(times=(2.0, 0.3, 0.1)), VE(), 0.34, (0.3, 0.1)),
    ],
    ids=repr,
)
def test_the_last_calls_of_a_student(
    sampler: FewStep, path: NoisePath, strength: float, times: tuple[float, ...]
) -> None:
    """Of its own times; on timesteps the share is rounded down, on other paths up."""
    found: Any = last_calls(sampler, path, strength)
    assert found.ladder(path) == list(times)
    assert (found.unit, found.steps) == (sampler.unit, len(times))
    assert found.noise == ("fresh" if sampler.noise == "fixed" else sampler.noise)
    guided = last_calls(CFG(sampler, 3.0, 0.1, 3.0), path, strength)
    assert guided == CFG(found, 3.0, 0.1, 3.0)


@pytest.mark.parametrize(
    "sampler", [Heun(Karras(), 10), MultiStep(Shifted(3.0, 1e-3), 10, "unipc")]
)
def test_the_last_calls_of_a_teacher(sampler: Heun | MultiStep) -> None:
    like = torch.empty(0, dtype=torch.float64)
    found: Any = last_calls(sampler, VE(), 0.4)
    assert torch.allclose(found.grid(like), sampler.grid(like)[-4:])


def test_refusals() -> None:
    for strength in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="the strength is above 0, and at most 1"):
            last_calls(FewStep(2.0, 4), VE(), strength)
    with pytest.raises(ValueError, match=r"0.3 leaves none of 2 steps; 0.5 leaves one"):
        last_calls(FewStep(999.0, 2), VP(), 0.3)
    for sampler in (Ancestral(2.0, 4), LinearSolver(6)):
        with pytest.raises(ValueError, match="starts at its own times alone"):
            last_calls(sampler, VE(), 0.5)
    made = generator(FewStep(2.0, 4), VE())
    with pytest.raises(ValueError, match=r"a picture to start from is \(1, 2\) to this model"):
        image_to_image(made, torch.zeros(2, 2), [1], 0.5)
    with pytest.raises(ValueError, match="this model takes none"):
        image_to_image(made, torch.zeros(1, 2), [1], 0.5, prompts=["a"])


def generator(sampler: Sampler, path: NoisePath) -> Generator:
    gaussian = Gaussian(torch.zeros(2), torch.eye(2), path)
    return Generator(gaussian, sampler, (2,))


@pytest.mark.parametrize("path", [VE(), VP(), Flow()], ids=repr)
@pytest.mark.parametrize("unit", [False, True])
def test_one_call_is_the_prediction_of_the_noised_picture(path: NoisePath, unit: bool) -> None:
    """f(alpha x_0 + sigma eps) = alpha x_t / (alpha^2 + sigma^2) for a standard normal law."""
    if unit and not isinstance(path, VP):
        pytest.skip("unit noise is for timesteps")
    last = {"VE": 0.8, "VP": 499.0, "Flow": 0.4}[type(path).__name__]
    first = {"VE": 2.0, "VP": 999.0, "Flow": 0.9}[type(path).__name__]
    made = generator(FewStep(times=(first, last), unit=unit), path)
    x0 = torch.tensor([[3.0, -1.0]])
    found = image_to_image(made, x0, [7, 8], 0.5)
    eps = Draws(torch.tensor([7, 8]), 0, "sample/").normal("z", (2,))
    t = torch.tensor(last, dtype=torch.float64)
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    expected = alpha * (alpha * x0 + sigma * eps) / (alpha**2 + sigma**2)
    assert torch.allclose(found, expected, atol=1e-5)
    assert steps_left(made, 0.5).sampler.calls == 1


def test_the_start_is_kept_the_more_the_lower_the_strength() -> None:
    """A planted loss of the picture, noise alone, is seen; and strength 1 is far from it."""
    made = generator(Heun(Karras(0.01, 80.0), 40), VE())
    x0 = torch.tensor([[2.0, -2.0]])
    far = [
        float((image_to_image(made, x0, range(50), share) - x0).norm(dim=1).mean())
        for share in (0.25, 0.5, 0.75, 1.0)
    ]
    assert far == sorted(far)
    assert far[0] < 0.6
    assert far[-1] > 2.0


@pytest.mark.parametrize(
    ("name", "betas"),
    [
        ("StableDiffusionImg2ImgPipeline", True),
        ("StableDiffusionXLImg2ImgPipeline", True),
        ("StableDiffusion3Img2ImgPipeline", False),
        ("FluxImg2ImgPipeline", False),
        ("QwenImageImg2ImgPipeline", False),
        ("ZImageImg2ImgPipeline", False),
    ],
)
def test_as_many_steps_as_stock_makes(name: str, betas: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    kind = getattr(diffusers, name)
    plain = diffusers.DDIMScheduler() if betas else diffusers.FlowMatchEulerDiscreteScheduler()
    for steps in (4, 10, 28, 50):
        plain.set_timesteps(steps)
        for strength in (0.07, 0.28, 0.3, 0.5, 0.58, 0.6, 0.7, 0.99, 1.0):
            stock = kind.get_timesteps(SimpleNamespace(scheduler=plain), steps, strength, "cpu")[0]
            own: Any = FewStep(999.0, steps) if betas else Heun(Shifted(), steps, 1)
            path: NoisePath = VP() if betas else Flow()
            if len(stock):
                assert last_calls(own, path, strength).calls == len(stock), (steps, strength)
            else:
                with pytest.raises(ValueError, match="leaves none"):
                    last_calls(own, path, strength)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_latents_are_those_of_the_stock_pipeline(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    """Stable Diffusion by DDIM on the same times, from the same latents, noise and prompts."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as module

    from fewstep.teachers.diffusers.load import load_pipeline

    folder, seeds, prompts = folders("sd"), [3, 4], ["a red cube", "a blue ball"]
    teacher = replace(load_pipeline(folder), decode=lambda x: x)
    teacher = teacher.in_steps(10).guided(guidance)
    x0 = torch.randn(1, 4, 8, 8)
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    eps = Draws(torch.tensor(seeds), 0, "sample/").normal("z", (4, 8, 8))
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **named: eps)
    called = {"strength": 0.6, "num_inference_steps": 10, "output_type": "latent"}
    start: Tensor = x0.expand(2, 4, 8, 8)
    stock = pipe(prompt=prompts, image=start, guidance_scale=guidance, **called).images
    found = image_to_image(teacher, x0, seeds, 0.6, prompts=prompts)
    assert torch.allclose(found, stock, atol=1e-4 * float(stock.abs().max()))
    other = image_to_image(teacher, x0, seeds, 0.7, prompts=prompts)
    assert not torch.allclose(other, stock, atol=1e-2 * float(stock.abs().max()))
