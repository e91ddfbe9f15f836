"""The published runs of DMD2 (Yin et al. 2024), https://arxiv.org/abs/2405.14867.

    fewstep distill dmd2_imagenet64 --teacher edm-imagenet-64x64-cond-adm.pkl \\
        --domain "Pictures('imagenet-64x64.zip')"

A step here is one update of the student and those of the fake score that go with it; the paper
counts the latter. Losses are means, as published, and the last weights are the result. How long
SDXL was trained is not in the paper's tables: 4,000 updates of the student here.
"""

from __future__ import annotations

from fewstep.critic import Critic
from fewstep.ema import EMA
from fewstep.guidance import Kappas
from fewstep.losses.weight import Power
from fewstep.methods.dmd2 import DMD2
from fewstep.optim import Optim
from fewstep.recipes.captions import Captions
from fewstep.recipes.pictures import Pictures
from fewstep.recipes.run import Run
from fewstep.recipes.score_identity import ADM
from fewstep.recipes.t2i import SAME
from fewstep.sample import FewStep
from fewstep.teachers.published import describe
from fewstep.times import Whole


def dmd2_imagenet64() -> Run:
    """DMD2 on ImageNet 64x64, as published (needs --domain "Pictures('PATH')")."""
    model, _ = describe("EDMPrecond", ADM)
    return Run(
        method=DMD2(),
        model=model,
        domain=Pictures(),
        steps=200_000 // 5,
        batch=280,
        accumulate=7,
        optim=Optim(2e-6, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0),
        ema=EMA(halflife=0.0),
        precision="bf16",
    )


def dmd2_sdxl() -> Run:
    """DMD2 on SDXL in four steps, as published (needs --domain "Captions('FOLDER')")."""
    times = Whole(20, 979)
    critic = Critic(
        Whole(0, 999),
        Power(2, -2),
        judging=Power(),
        scale=2 * 0.01 * (4 * 128 * 128),
        average="sample",
        pool="learned",
    )
    return Run(
        method=DMD2(
            FewStep(999.0, 4, unit=True),
            times,
            fake=critic,
            gan=5e-3,
            guidance=Kappas(real=8.0),
        ),
        model=SAME,
        domain=Captions(),
        steps=4000,
        batch=128,
        accumulate=64,
        optim=Optim(5e-7, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0),
        ema=EMA(halflife=0.0),
        precision="bf16",
    )
