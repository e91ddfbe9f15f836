"""Text to image: distil a diffusers pipeline from prompts alone.

The network, its noise path and its conditions are the teacher's; a run needs a pipeline folder
and a file of prompts. `t2i` is for models on betas (Stable Diffusion, SDXL, PixArt), `t2i_flow`
for flows (SD3, SANA, FLUX, Qwen-Image, Z-Image). The published runs are in
`fewstep.recipes.sid_text_to_image`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from fewstep.diffusion.model import Model, OfTeacher
from fewstep.diffusion.noise_path import Flow, NoisePath
from fewstep.diffusion.samplers import FewStep, ladder_of
from fewstep.diffusion.time_distributions import LogitNormal, Whole
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.guidance_scales import LSG
from fewstep.domains.prompts import Prompted, Prompts
from fewstep.losses.weight import Power
from fewstep.methods.sid import SiD
from fewstep.runs.run import Run
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim


def suit(run: Run, recipe: str, others: Mapping[str, Callable[[], Run]]) -> None:
    """Refuse a run on prompts whose few steps start outside the times of its teacher's noise.

    Whole timesteps of betas and the times 0 to 1 of a flow are numbers of another kind: 625 is no
    time of a flow, and at t = 1 of 1000 a picture is hardly noisy. others: recipes by name, of
    which those that do suit are named in the ValueError.
    """
    if not isinstance(run.model.net, DiffusersNet) or _starts_noisy(run, run.model.path):
        return
    fit = [
        name
        for name, make in others.items()
        if isinstance((other := make()).domain, Prompted) and _starts_noisy(other, run.model.path)
    ]
    kind = "a flow" if isinstance(run.model.path, Flow) else "a model on betas"
    fit.sort(key=len)
    times = f"{run.model.path.t_min:g} to {run.model.path.t_max:g}"
    remedy = "start where there is more noise than signal"
    if recipe not in fit:
        remedy = f"recipes for {kind} are {', '.join(fit)}"
    raise ValueError(
        f"{recipe} does not suit this teacher, which is {kind}: {run.method.sampler} does not fit "
        f"the times {times}, since it does not start from noise there; {remedy}"
    )


def _starts_noisy(run: Run, path: NoisePath) -> bool:
    """Whether a run's few-step sampler starts where there is more noise than signal."""
    try:
        ladder = ladder_of(run.method.sampler, path)
    except ValueError:
        return False
    if ladder is None:
        return True
    t = torch.tensor(ladder[0], dtype=torch.float64)
    return float(path.sigma(t)) >= float(path.alpha(t))


SAME = Model(OfTeacher(), ())
"""The teacher's network."""


def t2i() -> Run:
    """Distil a text-to-image model on betas to one step with SiD-LSG, from prompts alone.

    The published setting of https://arxiv.org/abs/2406.01561 for Stable Diffusion: t_init 625,
    t uniform on 20 .. 979, both losses in eps-space, Adam at 1e-6. A flow is refused; its recipe
    is t2i_flow.
    """
    times = Whole(20, 979)
    return Run(
        method=SiD(
            sampler=FewStep(625.0),
            alpha=1.0,
            times=times,
            fake=FakeScore(times, Power(2, -2)),
            guidance=LSG(1.5),
        ),
        model=SAME,
        domain=Prompts(),
        steps=20_000,
        batch=512,
        accumulate=512,
        optim=Optim(lr=1e-6, betas=(0.0, 0.999)),
        ema=EMA(halflife=50_000),
        sample_every=500,
        save_every=500,
    )


def t2i_flow() -> Run:
    """Distil a text-to-image flow (SD3, SANA, FLUX) to four steps with SiD, from prompts alone.

    The published setting of https://arxiv.org/abs/2509.25127: t log-normal in its odds around 2,
    the student's loss weighted by 1 - t, the fake score's by 1/t^2 (plain velocities).
    """
    times = LogitNormal(math.log(2), 1.6)
    return Run(
        method=SiD(
            sampler=FewStep(1.0, 4),
            alpha=1.0,
            times=times,
            weight=Power(1, 0),
            fake=FakeScore(times, Power(0, -2)),
            guidance=LSG(4.5),
        ),
        model=SAME,
        domain=Prompts(),
        steps=20_000,
        batch=256,
        accumulate=256,
        optim=Optim(lr=5e-6, betas=(0.0, 0.999)),
        ema=EMA(halflife=0.0),
        sample_every=500,
        save_every=500,
    )
