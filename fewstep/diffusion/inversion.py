"""Pictures back to noise, by a flow map that knows both directions (invertible students).

A flow map X(x_t, t, s) jumps to any time s, later ones too. Along the times t_1 > ... > t_K of
the sampler that generates, K jumps upwards lead from a picture to the noise that it is made of:

    x_0 at t_min  ->  t_K  ->  ...  ->  t_1,    z = x_1 / sigma_1.

`Jumps` from that z makes the picture again; with another condition or guidance it makes an edited
one (iCD, Starodubcev et al. 2024, https://arxiv.org/abs/2406.14539). The student must have been
trained upwards, as `InvertibleConsistency` does: others were never asked to add noise.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.noise_path import expand
from fewstep.diffusion.samplers import Jumps, WithInput
from fewstep.diffusion.types import Cond, Sampler


def invert(denoiser: Any, sampler: Sampler, x0: Tensor, cond: Cond = None) -> Tensor:
    """The noise z that `sampler` makes x0 of, as far as the student inverts itself.

    Args:
        denoiser: a flow map that was trained in both directions.
        sampler: the `Jumps` that it generates with, or one within `WithInput`; a guidance scale
            that it is told is not told here, since pictures are encoded without guidance.
        x0: (B, *), what the denoiser predicts: pictures, or their latents.
        cond: their own conditions, not those of the edit.

    Returns: z, (B, *). ValueError for another sampler. Gradients are not disabled.
    """
    named: dict[str, Tensor] = {}
    while isinstance(sampler, WithInput):
        value = 0.0 if sampler.name == "w" else sampler.value
        named[sampler.name] = torch.tensor(value, device=x0.device)
        sampler = sampler.sampler
    if not isinstance(sampler, Jumps):
        raise ValueError(f"pictures are inverted along the times of a Jumps, got {sampler}")
    path = denoiser.path
    ladder = [path.t_min, *reversed(sampler.ladder(path))]
    x = path.alpha(x0.new_tensor(path.t_min)) * x0
    for now, then in pairwise(ladder):
        t, s = (x0.new_full((x0.shape[0],), u) for u in (now, then))
        x = path.ddim(x, denoiser(x, t, cond, s=s, **named), t, s)
    z: Tensor = x / expand(path.sigma(s), x)
    return z
