"""The published runs of consistency models, flow maps and other distillation of trajectories.

    fewstep distill cd_cifar10 --teacher edm-cifar10-32x32-uncond-vp.pkl \\
        --domain "Pictures('cifar10-32x32.zip')"
    fewstep distill lcm_sd15 --teacher sd15 --domain "Captions('photos')"

Papers are named in the modules of the methods. A network is the teacher's own, its dropout with
it. A loss that was a sum over pixels is a mean here, and Adam's eps is divided by their number
(see fewstep.recipes.sid_edm). Where RAdam was published it is Adam, and AdamW's weight decay is
that which is stated.

Not stated, and the same everywhere: betas are (0.9, 0.999), gradients of adapters and of
text-to-image networks clipped at 1 and computed in bf16 as LCM's and DMD2's are, and the last
weights are the result. Parts of a batch are a matter of memory.

What else is not stated (*), and what differs:

CD: a mean square in place of LPIPS.
ECT: c = 0, the plain norm, is 1e-6 here.
PD: networks and noise levels are EDM's, spaced by rho = 7, in place of a cosine schedule; in the
last two halvings it is trained no longer than before. Teachers have 8192 and 1024 steps.
sCM: the rate of ImageNet is constant, where it fell after 35,000 steps; guidance is no input, and
the networks hear levels as EDM's and EDM2's do. *steps of CIFAR-10: as of ImageNet 64; *average of
ImageNet: as of CIFAR-10; *all of ImageNet 512: as of ImageNet 64.
AYF: without guidance by a weaker model; *batch, rate, steps and average: sCM's.
MeanFlow: one law of both times, where the end's is logit-normal around -4; it starts as the
teacher, in levels up to 80, without augmentation.
SFD: two calls without an analytical first step, at a constant rate, by a solver of second order.
GET: EDM's network in place of an equilibrium transformer. Its pairs are 12 GB of memory.

LCM: batch and steps are the paper's, the rate that of the script. Adapters are told the scale w,
too. *scale of samples: the middle of the range.
PCM: without its GAN and at one scale, the middle of 5 and 6; 48 steps of the solver, not 50.
TDD: *steps: PCM's.
SLAM: *batch and steps: LCM's; *kappa of SLAM and SCott: 9, the middle of LCM's.
SCott: a network of its own judges, in place of adapters on the decoder.
iCD: one network for both directions, w drawn evenly from 0 to 19; calls are at 999, 749, 499 and
249, where they were at 999, 779, 519 and 259. *scale of samples: w = 7, the least that guides.
SCFM: grids are shifted to the size of a picture in no part of the steps, adapters are on attention
alone, and FLUX's embedded scale is the pipeline's. *steps: PCM's; *shift of samples: the middle.

Not here: pi-Flow, of whose heads the networks of pipelines know nothing, and whose teacher of
ImageNet 256 fewstep does not read, nor MeanFlow's there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from fewstep.diffusion.model import Model
from fewstep.diffusion.samplers import FewStep, Heun, Jumps, WithInput
from fewstep.diffusion.time_distributions import LogitNormal, LogNormal
from fewstep.distillation.flow_maps import Ladder
from fewstep.distillation.method import Method
from fewstep.distillation.pairs import Pairs
from fewstep.domains.captions import Captions
from fewstep.domains.latents import LatentMoments
from fewstep.domains.pictures import Pictures
from fewstep.losses.distance import PseudoHuber
from fewstep.methods.ayf import AYF
from fewstep.methods.consistency_distillation import ConsistencyDistillation
from fewstep.methods.consistency_training import ConsistencyTraining
from fewstep.methods.invertible_consistency import InvertibleConsistency
from fewstep.methods.lcm import LCM
from fewstep.methods.mean_flow import MeanFlow
from fewstep.methods.pair_regression import PairRegression
from fewstep.methods.phased_consistency import PhasedConsistency
from fewstep.methods.progressive import ProgressiveDistillation
from fewstep.methods.scfm import SCFM
from fewstep.methods.scm import SCM
from fewstep.methods.scott import SCott
from fewstep.methods.sfd import SFD
from fewstep.methods.slam import SLAM
from fewstep.methods.tdd import TDD
from fewstep.nets.lora import LoRA
from fewstep.recipes.sid_edm import ADM, SETUPS, edm2
from fewstep.recipes.text_to_image import SAME
from fewstep.runs.run import Run
from fewstep.teachers.network_config import published_model
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim

BETAS = (0.9, 0.999)
LAST = EMA(halflife=0.0)
"""No average: the last weights."""
PIXELS = 3 * 32 * 32
"""Of CIFAR-10."""
ONE_CALL = FewStep(80.0)
TWO_CALLS = FewStep(times=(80.0, 0.5 * math.tan(1.1)))
"""sCM's, at the angles atan(80 / 0.5) and 1.1."""
LCM_CALLS = FewStep(times=(999.0, 759.0, 499.0, 259.0), unit=True)
"""Four of the 50 times 19, 39, ..., 999 that LCM is trained at, as its scheduler takes them."""
MIDDLE = 9.0
"""kappa = w + 1 in the middle of LCM's range."""


def average(decay: float, batch: int) -> EMA:
    """An average that keeps the share `decay` in every step."""
    return EMA(batch * math.log(0.5) / math.log(decay), ramp=1e9)


def _cifar10() -> Model:
    return published_model("EDMPrecond", SETUPS["cifar10_uncond"].network)


def cd_cifar10() -> Run:
    """CD on CIFAR-10, as published (needs --domain "Pictures('PATH')")."""
    return Run(
        method=ConsistencyDistillation(ONE_CALL, Ladder(17), decay=0.0),
        model=_cifar10(),
        domain=Pictures(),
        steps=800_000,
        batch=512,
        accumulate=16,
        optim=Optim(4e-4, betas=BETAS),
        ema=average(0.9999, 512),
    )


def cd_imagenet64() -> Run:
    """CD on ImageNet 64x64, as published (needs --domain "Pictures('PATH')")."""
    return Run(
        method=ConsistencyDistillation(ONE_CALL, Ladder(39), decay=0.95),
        model=published_model("EDMPrecond", ADM),
        domain=Pictures(),
        steps=600_000,
        batch=2048,
        accumulate=64,
        optim=Optim(8e-6, betas=BETAS),
        ema=average(0.999943, 2048),
    )


def ect_cifar10() -> Run:
    """ECT on CIFAR-10, as published (needs --domain "Pictures('PATH')")."""
    return Run(
        method=ConsistencyTraining(
            FewStep(times=(80.0, 0.821)),
            LogNormal(-1.1, 2.0),
            stages=8,
            stage_steps=25_000,
            distance=PseudoHuber(1e-6),
        ),
        model=_cifar10(),
        domain=Pictures(),
        steps=200_000,
        batch=128,
        accumulate=4,
        optim=Optim(1e-4, betas=BETAS, eps=1e-8 / math.sqrt(PIXELS)),
        ema=average(0.9999, 128),
    )


def pd_cifar10() -> Run:
    """Progressive distillation on CIFAR-10, as published (needs --domain "Pictures('PATH')")."""
    return _progressive(_cifar10(), 4096, 13 * 50_000, 128, 5e-5)


def pd_imagenet64() -> Run:
    """Progressive distillation, ImageNet 64x64, as published (--domain "Pictures('PATH')")."""
    return _progressive(published_model("EDMPrecond", ADM), 512, 10 * 50_000, 2048, 1e-4)


def _progressive(model: Model, start: int, steps: int, batch: int, lr: float) -> Run:
    """Halvings of 50,000 steps each, from `start` steps of the first student."""
    return Run(
        method=ProgressiveDistillation(
            FewStep(80.0, noise="ddim", rho=7.0), start=start, stage_steps=50_000
        ),
        model=model,
        domain=Pictures(),
        steps=steps,
        batch=batch,
        accumulate=batch // 32,
        optim=Optim(lr, betas=BETAS, clip=1.0),
        ema=LAST,
    )


def scm_cifar10() -> Run:
    """sCM on CIFAR-10, distilled, as published (needs --domain "Pictures('PATH')")."""
    return _scm_cifar10(1.4, "teacher")


def sct_cifar10() -> Run:
    """sCM on CIFAR-10, by data alone, as published (needs --domain "Pictures('PATH')")."""
    return _scm_cifar10(1.8, "data")


def _scm_cifar10(std: float, velocity: Literal["teacher", "data"]) -> Run:
    """sCD or sCT."""
    return Run(
        method=SCM(TWO_CALLS, LogNormal(-1.0, std), velocity=velocity, warmup=10_000),
        model=_cifar10(),
        domain=Pictures(),
        steps=400_000,
        batch=512,
        accumulate=16,
        optim=Optim(1e-4, betas=(0.9, 0.99)),
        ema=EMA(500_000.0),
    )


def scm_imagenet64() -> Run:
    """sCM on ImageNet 64x64, EDM2-S, as published (needs --domain "Pictures('PATH')")."""
    model = published_model("Precond", edm2(192, 0.0) | {"img_channels": 3})
    return _on_edm2(_scm(), model, SETUPS["edm2_s"].part, Pictures())


def _scm() -> SCM:
    return SCM(TWO_CALLS, LogNormal(-1.0, 1.6), warmup=10_000)


def _on_edm2(method: Method, model: Model, part: int, domain: Pictures | LatentMoments) -> Run:
    """A run with sCM's settings of ImageNet 64."""
    return Run(
        method=method,
        model=model,
        domain=domain,
        steps=400_000,
        batch=2048,
        accumulate=2048 // part,
        optim=Optim(1e-4, betas=(0.9, 0.99), eps=1e-11),
        ema=EMA(500_000.0),
    )


def _scm_on_latents(name: str) -> Callable[[], Run]:
    """sCM on an EDM2 network of ImageNet 512."""
    row = SETUPS[name]

    def make() -> Run:
        return _on_edm2(_scm(), published_model("Precond", row.network), row.part, LatentMoments())

    needs = "--domain \"LatentMoments('PATH')\""
    make.__doc__ = f"sCM on {row.title}, set as for 64x64 ({needs})."
    return make


def ayf_edm2_s() -> Run:
    """AYF on ImageNet 512x512, EDM2-S, in sCM's batches (--domain "LatentMoments('PATH')").

    Four jumps, whose levels are spaced by EDM's rho.
    """
    method = AYF(Jumps(80.0, 4, 7.0), warmup=10_000, r=0.99)
    row = SETUPS["edm2_s"]
    return _on_edm2(method, published_model("Precond", row.network), row.part, LatentMoments())


def mean_flow_cifar10() -> Run:
    """MeanFlow on CIFAR-10, by data alone, as published (needs --domain "Pictures('PATH')")."""
    return Run(
        method=MeanFlow(
            Jumps(80.0), LogitNormal(-0.6, 1.6), diagonal=0.25, velocity="data", p=0.75
        ),
        model=_cifar10(),
        domain=Pictures(),
        steps=1_000_000,
        batch=1024,
        accumulate=32,
        optim=Optim(6e-4, betas=BETAS, warmup=200 * 50_000 // 1024),
        ema=average(0.9999, 1024),
    )


def sfd_cifar10() -> Run:
    """SFD on CIFAR-10 in two calls, as published (no data)."""
    return Run(
        method=SFD(FewStep(80.0, 2, "ddim", rho=7.0), between=3),
        model=_cifar10(),
        domain=Pictures(),
        steps=math.ceil(200_000 / 128),
        batch=128,
        accumulate=4,
        optim=Optim(5e-5, betas=BETAS, eps=1e-8 / PIXELS),
        ema=LAST,
    )


def get_cifar10() -> Run:
    """GET's regression on a million pairs of CIFAR-10, as published (no data)."""
    return Run(
        method=PairRegression(ONE_CALL, Pairs(1_000_000, Heun(steps=18))),
        model=_cifar10(),
        domain=Pictures(),
        steps=800_000,
        batch=128,
        accumulate=4,
        optim=Optim(1e-4, betas=BETAS),
        ema=LAST,
    )


def _text(
    method: Method, steps: int, batch: int, lr: float, rank: int = 0, clip: float = 1.0
) -> Run:
    """A text-to-image run with captions; rank: of its adapters, 0: the whole network."""
    return Run(
        method=method,
        model=SAME,
        domain=Captions(),
        steps=steps,
        batch=batch,
        accumulate=batch,
        optim=Optim(lr, betas=BETAS, clip=clip),
        ema=LAST,
        precision="bf16",
        lora=LoRA(rank) if rank else None,
    )


def lcm_sd15() -> Run:
    """LCM on Stable Diffusion 1.5, as published (needs --domain "Captions('FOLDER')")."""
    method = LCM(WithInput(LCM_CALLS, "w", MIDDLE - 1), Ladder(50), kappa=(3.0, 15.0))
    return _text(method, 100_000, 72, 1e-6)


def lcm_lora_sd15() -> Run:
    """LCM as adapters, Stable Diffusion 1.5, as published (--domain "Captions('FOLDER')")."""
    method = LCM(WithInput(LCM_CALLS, "w", 10.0), Ladder(50), kappa=(6.0, 16.0), decay=0.0)
    return _text(method, 1000, 12, 1e-4, rank=64)


def lcm_lora_sdxl() -> Run:
    """LCM as adapters, SDXL, as published (needs --domain "Captions('FOLDER')")."""
    return lcm_lora_sd15()


def pcm_sd15() -> Run:
    """PCM on Stable Diffusion 1.5, as published (needs --domain "Captions('FOLDER')")."""
    method = PhasedConsistency(FewStep(999.0, 4, "ddim", unit=True), decay=0.0, kappa=5.5)
    return _text(method, 5000, 20, 5e-6, rank=64)


def tdd_sdxl() -> Run:
    """TDD on SDXL, as published (needs --domain "Captions('FOLDER')")."""
    sampler = FewStep(999.0, 4, "ddim", unit=True)
    method = TDD(sampler, (4, 8), 250, 0.26, decay=0.0, kappa=4.5, drop=0.2)
    return _text(method, 5000, 64, 1e-6, rank=64)


def slam_sd15() -> Run:
    """SLAM on Stable Diffusion 1.5, with LCM's batch (needs --domain "Captions('FOLDER')")."""
    method = SLAM(
        WithInput(LCM_CALLS, "gamma", 1.0), Ladder(50), noise="independent", kappa=MIDDLE
    )
    return _text(method, 100_000, 72, 8e-6)


def scott_sd15() -> Run:
    """SCott on Stable Diffusion 1.5, as published (needs --domain "Captions('FOLDER')")."""
    run = _text(SCott(FewStep(999.0, 2, unit=True), kappa=MIDDLE), 40_000, 40, 8e-6)
    return replace(run, fake_optim=replace(run.optim, lr=2e-5))


def icd_sd15() -> Run:
    """iCD on Stable Diffusion 1.5, as published (needs --domain "Captions('FOLDER')")."""
    method = InvertibleConsistency(Jumps(999.0, 4), Ladder(50), kappa=8.0, scales=(1.0, 20.0))
    return _text(method, 6000, 8, 8e-6, rank=64)


def scfm_flux() -> Run:
    """SCFM on FLUX at 512 pixels, as published (needs --domain "Captions('FOLDER')")."""
    shift = 3.5
    times = tuple(shift * u / (1 + (shift - 1) * u) for u in (1.0, 0.75, 0.5, 0.25))
    method = SCFM(FewStep(times=times, noise="ddim"), shift=(2.5, 4.5), fast=0.99, slow=0.999)
    return _text(method, 5000, 8, 2e-5, rank=64, clip=10.0)


RECIPES = {
    f"scm_{name}": _scm_on_latents(name)
    for name in ("edm2_s", "edm2_m", "edm2_l", "edm2_xl", "edm2_xxl")
}
"""What `fewstep recipes` lists besides the functions above."""
