"""The published runs of DMD2 (Yin et al. 2024), https://arxiv.org/abs/2405.14867.

    fewstep distill dmd2_imagenet64 --teacher edm-imagenet-64x64-cond-adm.pkl \\
        --domain "Pictures('imagenet-64x64.zip')"

Stable Diffusion 1.5 is distilled in two phases: without the GAN, from prompts alone, which is
Diff-Instruct on two time scales; then with it, at a lower rate, from the student of the first,

    fewstep distill dmd2_sd15 --teacher sd15 --prompts prompts.txt --out runs/first
    fewstep distill dmd2_sd15_gan --teacher sd15 --init runs/first \\
        --domain "Captions('photos')" --out runs/dmd2

where the published run takes over the fake score, too; here it starts as the teacher again.

A step here is one update of the student and those of the fake score that go with it; the paper
counts the latter. Losses are means, as published, and the last weights are the result. How long
SDXL was trained is not in the paper's tables: 4,000 updates of the student here.
"""

from __future__ import annotations

from dataclasses import replace

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Whole
from fewstep.distillation.critic import Critic
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.guidance_scales import Kappas
from fewstep.domains.captions import Captions
from fewstep.domains.pictures import Pictures
from fewstep.domains.prompts import Prompts
from fewstep.losses.weight import L1, Power
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.dmd2 import DMD2
from fewstep.recipes.sid_edm import ADM
from fewstep.recipes.text_to_image import SAME
from fewstep.runs.run import Run
from fewstep.teachers.network_config import published_model
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim

LEVELS, STUDENT_LEVELS = Whole(0, 999), Whole(20, 980)
"""Timesteps of the fake score's losses, and of the student's: 0.02 to 0.98 of a thousand."""
EPS = Power(2, -2)
"""The fake score's loss is that of eps."""


def _optim(lr: float) -> Optim:
    return Optim(lr, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0)


def _critic(latents: int) -> Critic:
    """Weighted 0.01 against the mean over so many latents, as a sum of real and fake."""
    scale = 2 * 0.01 * latents
    return Critic(LEVELS, EPS, judging=Power(), scale=scale, average="sample", pool="learned")


def dmd2_imagenet64() -> Run:
    """DMD2 on ImageNet 64x64, as published (needs --domain "Pictures('PATH')")."""
    model = published_model("EDMPrecond", ADM)
    return Run(
        method=DMD2(),
        model=model,
        domain=Pictures(),
        steps=200_000 // 5,
        batch=280,
        accumulate=7,
        optim=_optim(2e-6),
        ema=EMA(halflife=0.0),
        precision="bf16",
    )


def dmd2_sd15() -> Run:
    """DMD2 on Stable Diffusion 1.5 in one step, before its GAN, as published (prompts alone)."""
    return Run(
        method=DiffInstruct(
            FewStep(999.0, unit=True),
            STUDENT_LEVELS,
            L1(),
            FakeScore(LEVELS, EPS),
            ratio=10,
            guidance=Kappas(real=1.75),
        ),
        model=SAME,
        domain=Prompts(),
        steps=39_000 // 10,
        batch=2048,
        accumulate=64,
        optim=_optim(1e-5),
        ema=EMA(halflife=0.0),
        precision="bf16",
        recompute=True,
    )


def dmd2_sd15_gan() -> Run:
    """DMD2 on Stable Diffusion 1.5 with its GAN (--init STUDENT --domain "Captions('FOLDER')")."""
    first = dmd2_sd15()
    method = DMD2(
        first.method.sampler,
        STUDENT_LEVELS,
        fake=_critic(4 * 64 * 64),
        ratio=10,
        gan=1e-3,
        guidance=Kappas(real=1.75),
    )
    return replace(
        first,
        method=method,
        domain=Captions(),
        steps=2000 // 10,
        optim=_optim(5e-7),
        save_every=100,
    )


def dmd2_sdxl() -> Run:
    """DMD2 on SDXL in four steps, as published (needs --domain "Captions('FOLDER')")."""
    return Run(
        method=DMD2(
            FewStep(999.0, 4, unit=True),
            STUDENT_LEVELS,
            fake=_critic(4 * 128 * 128),
            gan=5e-3,
            guidance=Kappas(real=8.0),
        ),
        model=SAME,
        domain=Captions(),
        steps=4000,
        batch=128,
        accumulate=64,
        optim=_optim(5e-7),
        ema=EMA(halflife=0.0),
        precision="bf16",
    )
