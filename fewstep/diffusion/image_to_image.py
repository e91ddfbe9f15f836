"""From a picture in place of pure noise: img2img.

The picture x_0 is noised up to the first of the sampler's last calls, and denoised from there
(SDEdit, Meng et al. 2021, https://arxiv.org/abs/2108.01073):

    x_t = alpha_t x_0 + sigma_t eps.

The strength is a share of the sampler's calls, as in diffusers' img2img pipelines, not of noise:
0.5 makes the last half of them (`fewstep.diffusion.sampler_changes.last_calls`). A student of K
calls has K strengths, 1 / K to 1.

    student = open_model("runs/fast")
    image_to_image(student, student.encode(picture), range(4), 0.5, prompts=["a fox"] * 4)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.pixels import finite
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.sampler_changes import last_calls, starting
from fewstep.diffusion.types import select_rows


@torch.no_grad()
def image_to_image(
    generator: Generator,
    x0: Tensor,
    seeds: Sequence[int],
    strength: float,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
) -> Tensor:
    """Pictures made from another one, which is noised and denoised.

    Args:
        generator: a student or a teacher.
        x0: (1, *), what the generator's `encode` gives for a picture in [-1, 1].
        seeds: N numbers, whose noise is added: that of `Generator.sample` with these seeds.
        strength: the share of the sampler's calls that are made, above 0 and at most 1.
        labels: N class numbers, by default those of `Generator.sample`.
        prompts: N texts, for a model that takes prompts.

    Returns: (N, *), decoded. ValueError for another shape or number of arguments, where a
    strength leaves no call, and where the sampler has a course of its own.
    """
    if x0.shape != (1, *generator.shape):
        raise ValueError(
            f"a picture to start from is {(1, *generator.shape)} to this model, got "
            f"{tuple(x0.shape)}"
        )
    if (prompts is None) != (generator.text is None):
        raise ValueError("this model " + ("needs prompts" if prompts is None else "takes none"))
    index = torch.tensor(list(seeds), dtype=torch.int64)
    if generator.text is None:
        cond = generator.conditions(index, labels)
    else:
        cond = generator.text(list(prompts or ()))
    here = select_rows(cond, torch.arange(len(index)), generator.device)
    path = generator.denoiser.path
    sampler = last_calls(generator.sampler, path, strength)
    draws = Draws(index.to(generator.device), 0, "sample/")
    z = starting(sampler, path, x0, draws.normal("z", generator.shape))
    return finite(generator.decode(finite(sampler(generator.denoiser, z, here, draws))))


def steps_left(generator: Generator, strength: float) -> Generator:
    """The generator whose sampler makes the last calls alone, for what is told of it."""
    path = generator.denoiser.path
    return replace(generator, sampler=last_calls(generator.sampler, path, strength))
