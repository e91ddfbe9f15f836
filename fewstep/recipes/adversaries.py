"""The published runs of adversarial distillation, as far as they are stated.

    fewstep distill lightning_sdxl --teacher sdxl --domain "Captions('photos')"
    fewstep distill ladd_sd3 --teacher sd3 --prompts prompts.txt

Papers are named in the modules of the methods, whose defaults suit small problems; here is what
was published. Not stated, and the same everywhere: betas (0.9, 0.999) and no weight decay but
where said, precision (bf16 here), and that the last weights are the result. Published systems
update student and discriminator in turn; here both are updated in a step.

What else is not stated (*), and what differs:

LADD: laws of times are known from others' accounts. The teacher's encoder features are judged, not
every block's: name these with --method.judge.layers. *rates: those of a public LADD of a video
model; *batch and length: those of SiD on SD3, *number of pairs and their guidance: 4,096, made as
the teacher's pipeline makes pictures.
ADD: heads hear no conditions, and c is alpha ("exponential"), where the final model's was NFSD's.
The folder dinov2-small is DINOv2's ViT-S in the format of transformers. *rate: Flash's; *batch and
steps: DMD2's on SDXL.
SDXL-Lightning: one run trains adapters or the whole network, where it was one after the other;
adapters are on attention, and end at two steps, as published. Discriminators have the student's
rate there, and here once a stage has one. *steps of a stage: Flash's.
Flash Diffusion: squared errors in place of LPIPS of decoded crops, and a fake score of its own in
place of the student; *levels of the KL direction and its fake score: DMD2's.
Diffusion2GAN: distances are in the teacher's features, in place of E-LatentLPIPS; real pairs at
another noise are a fifth of the generated. Pairs are 50 steps of DDIM at kappa = 8; three million
are 200 GB of memory: fewer with --method.pairs.count. *rate: Flash's; *steps: DMD2's on SDXL;
*weight of the GAN and of R1: the method's.
"""

from __future__ import annotations

import math
from dataclasses import replace

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Discrete, LogitNormal, Whole
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.feature_distance import FeatureDistance
from fewstep.distillation.method import Method
from fewstep.distillation.pairs import Pairs
from fewstep.domains.captions import Captions
from fewstep.domains.prompts import Prompts
from fewstep.eval.picture_networks import VisionFeatures
from fewstep.losses.adversarial import GradientPenalty
from fewstep.losses.weight import Power
from fewstep.methods.add import ADD
from fewstep.methods.diffusion2gan import Diffusion2GAN
from fewstep.methods.flash_diffusion import FlashDiffusion
from fewstep.methods.ladd import LADD
from fewstep.methods.lightning import Lightning
from fewstep.nets.lora import LoRA
from fewstep.recipes.dmd2 import EPS, LEVELS, STUDENT_LEVELS
from fewstep.recipes.text_to_image import SAME
from fewstep.runs.run import Run
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim

JUDGED = Discrete((10.0, 250.0, 500.0, 750.0))
"""Timesteps that samples are judged at by SDXL-Lightning and by Flash Diffusion."""
FOUR = FewStep(999.0, 4, unit=True)
STAGE = 5000
"""Steps of a stage of Flash Diffusion, and here of SDXL-Lightning."""


def _text(method: Method, steps: int, batch: int, optim: Optim, rank: int = 0) -> Run:
    """A text-to-image run; rank: of its adapters, 0: the whole network."""
    return Run(
        method=method,
        model=SAME,
        domain=Captions() if method.needs_data else Prompts(),
        steps=steps,
        batch=batch,
        accumulate=batch,
        optim=optim,
        ema=EMA(halflife=0.0),
        precision="bf16",
        lora=LoRA(rank) if rank else None,
    )


def _adam(lr: float) -> Optim:
    return Optim(lr, betas=(0.9, 0.999))


def ladd_sd3() -> Run:
    """LADD on SD3 in four steps, as published, with SiD's batch (prompts alone)."""
    method = LADD(
        FewStep(1.0, 4),
        judge=Discriminator(LogitNormal(1.0, 1.0), loss="hinge"),
        shares=(0.7, 0.1, 0.1, 0.1),
        early_shares=(0.0, 0.0, 0.5, 0.5),
        early=500,
        rate=1.0,
    )
    return replace(
        _text(method, math.ceil(1_000_000 / 256), 256, _adam(2e-6)), fake_optim=_adam(4e-6)
    )


def add_sd21() -> Run:
    """ADD on Stable Diffusion 2.1, as published (needs --domain "Captions('FOLDER')")."""
    judge = Discriminator(
        None,
        VisionFeatures("dinov2-small"),
        loss="hinge",
        penalty=GradientPenalty(1e-5, of="features"),
    )
    method = ADD(FOUR, judge=judge, times=Whole(0, 999), weight=Power(1, 0), pictures=True)
    return _text(method, 4000, 128, _adam(1e-5))


def lightning_sdxl() -> Run:
    """SDXL-Lightning, one step, as published (needs --domain "Captions('FOLDER')")."""
    return _lightning((32, 8, 4, 2, 1), 5e-7)


def lightning_lora_sdxl() -> Run:
    """SDXL-Lightning in two steps, adapters, as published (--domain "Captions('FOLDER')")."""
    return _lightning((32, 8, 4, 2), 1e-6, rank=64)


def _lightning(stages: tuple[int, ...], lr: float, rank: int = 0) -> Run:
    """lr: of the adversarial stages."""
    first = Optim(1e-5, betas=(0.0, 0.99))
    method = Lightning(
        FewStep(999.0, stages[-1], "ddim", unit=True),
        teacher_steps=128,
        stages=stages,
        stage_steps=STAGE,
        judge=Discriminator(JUDGED, "own", joint=True),
        squared=0.0,
        rate=lr / first.lr,
        kappa=6.0,
    )
    run = _text(method, len(stages) * STAGE, 512, first, rank)
    return replace(run, fake_optim=replace(first, lr=lr))


def flash_sd15() -> Run:
    """Flash Diffusion on Stable Diffusion 1.5, as published (--domain "Captions('FOLDER')")."""
    return _flash(128)


def flash_sdxl() -> Run:
    """Flash Diffusion on SDXL, as published (needs --domain "Captions('FOLDER')")."""
    return _flash(64)


def _flash(rank: int) -> Run:
    """rank: of the adapters."""
    method = FlashDiffusion(
        FOUR,
        stage_steps=STAGE,
        kappa=(3.0, 13.0),
        judge=Discriminator(JUDGED, loss="least_squares"),
        times=STUDENT_LEVELS,
        fake=FakeScore(LEVELS, EPS),
    )
    return _text(method, 4 * STAGE, 2, _adam(1e-5), rank)


def diffusion2gan_sd15() -> Run:
    """Diffusion2GAN on Stable Diffusion 1.5, pairs and batch as published (prompts alone)."""
    method = Diffusion2GAN(
        FewStep(999.0, unit=True),
        Pairs(3_000_000, CFG(Heun(Whole(0, 999), 50, order=1), 8.0)),
        FeatureDistance(STUDENT_LEVELS),
    )
    return _text(method, 4000, 1024, _adam(1e-5))
