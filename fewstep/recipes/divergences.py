"""The published runs of DMD, f-distill and Uni-Instruct on EDM networks.

    fewstep distill dmd_cifar10_cond --teacher edm-cifar10-32x32-cond-vp.pkl
    fewstep distill f_distill_imagenet64 --teacher edm-imagenet-64x64-cond-adm.pkl \\
        --domain "Pictures('imagenet-64x64.zip')"

DMD (Yin et al. 2023, https://arxiv.org/abs/2311.18828) needs no data, but samples of the teacher,
which are made first. Not stated, and CIFAR-10's or the default here: ImageNet's warm-up, clipping
and weight of the regression, and precision. It differs in two things: the published distance is
LPIPS at 224 pixels, in place of which stands a mean of squares (`--method.distance` takes features
of pictures), so that the weight of the regression means another thing; and dropout, off as
published, is the teacher's.

f-distill (Xu et al. 2025, https://arxiv.org/abs/2502.15681; numbers of FastGen, its code) is DMD2
with a density ratio, read at the scores' own x_t from heads on the teacher. A step is one update
of the student with the 5 that go before; the code counts all of them. Not stated, and DMD2's here:
betas, decay, clipping and precision; CIFAR-10's rate is "FastGen's default", 1e-4. Bins here are
of equal mass, and r is clipped after it is normalised. Of the three averages one is kept.

Uni-Instruct (Wang et al. 2025, https://arxiv.org/abs/2505.20755) has the schedule, laws, scales,
averages and clipping of SiDA (`fewstep.recipes.sid_edm`) for 300 million pictures. Not stated is
which divergence each result is of: Jeffreys', the default. The released code detaches the ratio,
which has a gradient here.

EMD, moment matching and MSD have no recipe: of their batches, rates and steps some are not stated.

Parts of a batch are not stated: 56 samples or 64, which changes nothing but the memory.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from fewstep.diffusion.model import Model
from fewstep.diffusion.samplers import Heun
from fewstep.diffusion.time_distributions import Karras
from fewstep.distillation.critic import Critic
from fewstep.distillation.pairs import Pairs
from fewstep.domains.pictures import Pictures
from fewstep.losses.weight import L1, Power
from fewstep.methods.dmd import DMD
from fewstep.methods.f_distill import FDistill
from fewstep.methods.sida import SiDA
from fewstep.methods.uni_instruct import UniInstruct
from fewstep.recipes.dmd2 import dmd2_imagenet64
from fewstep.recipes.sid_edm import RECIPES as SID, SETUPS
from fewstep.runs.run import Run
from fewstep.teachers.network_config import published_model
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim

LAST = EMA(halflife=0.0)
"""No average: the last weights."""


def adamw(lr: float, warmup: int = 0) -> Optim:
    """AdamW as DMD and DMD2 have it."""
    return Optim(lr, betas=(0.9, 0.999), weight_decay=0.01, warmup=warmup, clip=10.0)


def average(decay: float, batch: int) -> EMA:
    """The average that keeps so much of itself at each update, from the second on."""
    return EMA(batch * math.log(0.5) / math.log(decay), ramp=1e6)


def _model(setup: str) -> Model:
    return published_model(SETUPS[setup].class_name, SETUPS[setup].network)


def _dmd(setup: str, batch: int, lr: float, pairs: Pairs, regression: float, steps: int) -> Run:
    return Run(
        method=DMD(pairs=pairs, regression=regression),
        model=_model(setup),
        domain=Pictures(),
        steps=steps,
        batch=batch,
        accumulate=batch // 56,
        optim=adamw(lr, warmup=500),
        ema=LAST,
    )


def dmd_cifar10_cond() -> Run:
    """DMD on CIFAR-10, class-conditional, as published but for its distance (no data)."""
    return _dmd("cifar10_cond", 392, 5e-5, Pairs(100_000, Heun()), 0.25, 300_000)


def dmd_cifar10_uncond() -> Run:
    """DMD on CIFAR-10, unconditional, as published but for its distance (no data)."""
    return _dmd("cifar10_uncond", 392, 5e-5, Pairs(500_000, Heun()), 0.5, 300_000)


def dmd_imagenet64() -> Run:
    """DMD on ImageNet 64x64, as published but for its distance (no data)."""
    return _dmd("imagenet64", 336, 2e-6, Pairs(25_000, Heun(steps=256)), 0.25, 350_000)


def _f_distill(
    setup: str, family: Literal["kl", "js"], gan: float, rate: float, batch: int
) -> Run:
    judge = Critic(Karras(), judging=Power(), average="sample", pool="learned", features="teacher")
    return replace(
        dmd2_imagenet64(),
        method=FDistill(
            family=family, times=Karras(), weight=L1(1e-6), fake=judge, gan=gan, rate=rate
        ),
        model=_model(setup),
        batch=batch,
        accumulate=batch // 64,
        ema=average(0.9999, batch),
    )


def f_distill_cifar10_cond() -> Run:
    """f-distill on CIFAR-10 with KL, as published (needs --domain "Pictures('PATH')")."""
    run = _f_distill("cifar10_cond", "kl", gan=1e-3, rate=0.0, batch=2048)
    return replace(run, steps=100_000 // 5, optim=adamw(1e-4))


def f_distill_imagenet64() -> Run:
    """f-distill on ImageNet 64x64 with JS, as published (needs --domain "Pictures('PATH')")."""
    run = _f_distill("imagenet64", "js", gan=3e-3, rate=0.5, batch=512)
    return replace(run, steps=600_000 // 5, optim=adamw(2e-6))


def _uni_instruct(setup: str) -> Run:
    run = SID[f"sida_{setup}"]()
    sida = run.method
    assert isinstance(sida, SiDA)
    method = UniInstruct(
        fake=sida.fake, student_from=sida.student_from, divergence_from=sida.adversarial_from
    )
    return replace(run, method=method)


def uni_instruct_cifar10_uncond() -> Run:
    """Uni-Instruct on CIFAR-10, no labels, as published (needs --domain "Pictures('PATH')")."""
    return _uni_instruct("cifar10_uncond")


def uni_instruct_cifar10_cond() -> Run:
    """Uni-Instruct on CIFAR-10 with labels, as published (needs --domain "Pictures('PATH')")."""
    return _uni_instruct("cifar10_cond")


def uni_instruct_imagenet64() -> Run:
    """Uni-Instruct on ImageNet 64x64, as published (needs --domain "Pictures('PATH')")."""
    return _uni_instruct("imagenet64")
