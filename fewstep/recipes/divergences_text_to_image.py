"""The published text-to-image runs of DMD, SwiftBrush, f-distill and others of the KL family.

    fewstep distill swiftbrush_sd21 --teacher sd21 --prompts prompts.txt
    fewstep distill swd_sd35 --teacher sd35 --domain "Captions('made_by_the_teacher')"

Scales of guidance are those of f_0 + kappa (f_c - f_0). Steps are updates of the student. What is
not stated is the sibling's: DMD2's on Stable Diffusion and SDXL (`fewstep.recipes.dmd2`), few-step
SiD's on flows, and `t2i`'s (20,000 steps) where these say nothing either. Of the runs below, with
what is not stated and what cannot be said here:

DMD, https://arxiv.org/abs/2311.18828: guides the teacher alone. Not stated: the weight of the
regression (DMD's 0.25). Published: LPIPS of decoded pictures, here a mean of squares on latents;
half as many pairs as samples, which join these, here as many, apart; pairs by PNMS, here by
DPM-Solver++ in as many steps.

SwiftBrush, https://arxiv.org/abs/2312.05239: teacher and fake score are guided where they are
compared; the fake score learns without guidance. Not stated: GPUs of 16 samples (4, as SNOOPI's),
steps, and the length of the average. Published: adapters on the fake score alone, and conditions
dropped by batches; here the student has adapters too, for which its rate, published for whole
weights, is low, and conditions are dropped by samples.

SNOOPI, https://arxiv.org/abs/2412.02687: SwiftBrush with kappa at random; `RandomLSG` has it in
the fake score's own loss as well. Not stated: steps, betas, decay, clipping (SwiftBrush's). Of the
batches 64 and 32 the first is taken. Its negative prompts at sampling (NASA) are left out.

f-distill, https://arxiv.org/abs/2502.15681: not stated are the divergence (js), steps, betas,
decay, and SDXL's GPUs of 6 samples (DMD2's batch of 128).

Decoupled DMD, https://arxiv.org/abs/2511.22677: DMD2's run on SDXL. Not stated: kappa (DMD2's 8),
how many updates the fake score has (5), the ends of "all levels" (DMD2's).

DisBack, https://arxiv.org/abs/2408.15991: not stated are calls (one) and GPUs of 1 sample (DMD2's
batch of 128).

CDM, https://arxiv.org/abs/2605.06376: the released code multiplies the augmentation by the scale
7, not by 7 - 1, so kappa is 8. Not stated: noise levels and weight of the fake score's loss (the
student's; velocities), calls at sampling (4). Published: augmentation from level 0 on, here 0.02.

TDM, https://arxiv.org/abs/2503.06674: not stated is the batch (SIM's 256 on PixArt). Published:
levels 10 below those of all calls, here of the first; moments in 8 bits (`--optim.bits 8`); a
weight of the noise's likelihood, which is 1.003 in so many dimensions, left out.

SwD, https://arxiv.org/abs/2503.16397: of 28 noise levels, at shift 3, the calls have numbers 0, 7,
14 and 18 and the losses 12 to 27, 18 to 27 for patches. Not stated: the fake score's levels (the
student's), precision. Published: sizes 64, 80, 96, 128, here the nearest that divide, 64, 64, 128,
128; features of the fake score, here the teacher's; an adversarial loss of weight 0.005, left out.
Pictures of the folder are to be the teacher's own.

Phased DMD, https://arxiv.org/abs/2510.27684: not stated are kappa (SiD's 4.5), the length of
phases (400), betas and decay (DMD2's). Published: adapters of rank 64 on the student, at 5e-5;
experts have none here, so that the rate is the published one of whole weights.

Self-E, https://arxiv.org/abs/2512.22374: published from scratch for 2B weights; here it starts as
the teacher. Not stated: weight decay, how the rate falls to 1e-5 (here linearly to 0), calls at
sampling (8). Published: batches of 768 at 512 pixels for the last 210,000 steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.samplers import FewStep, Jumps, MultiStep
from fewstep.diffusion.scale_wise import ScaleWise
from fewstep.diffusion.time_distributions import Discrete, Uniform, Whole
from fewstep.distillation.critic import Critic
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.guidance_scales import Guidance, Kappas, RandomLSG
from fewstep.distillation.method import Method
from fewstep.distillation.pairs import Pairs
from fewstep.domains.captions import Captions
from fewstep.domains.prompts import Prompts
from fewstep.losses.weight import L1, MinSNR, Power
from fewstep.methods.cdm import CDM
from fewstep.methods.decoupled_dmd import DecoupledDMD
from fewstep.methods.disback import DisBack
from fewstep.methods.dmd import DMD
from fewstep.methods.f_distill import FDistill
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.self_e import SelfE
from fewstep.methods.swd import SwD
from fewstep.methods.tdm import TDM
from fewstep.methods.vsd import VSD
from fewstep.nets.lora import LoRA
from fewstep.recipes.divergences import LAST, adamw, average
from fewstep.recipes.dmd2 import EPS, LEVELS, STUDENT_LEVELS, dmd2_sd15, dmd2_sdxl
from fewstep.recipes.text_to_image import SAME
from fewstep.runs.run import Run
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim

ONE, FOUR = FewStep(999.0, unit=True), FewStep(999.0, 4, unit=True)
FLOW = FewStep(1.0, 4, "ddim")
VELOCITY = Power(0, -2)
"""The fake score's loss is that of velocities of a flow."""


def _on_flow(method: Method, batch: int, parts: int, steps: int, **more: Any) -> Run:
    settings: dict[str, Any] = {"domain": Prompts(), "ema": LAST, "precision": "bf16", **more}
    return Run(method, SAME, steps=steps, batch=batch, accumulate=parts, **settings)


def dmd_sd15() -> Run:
    """DMD on Stable Diffusion 1.5, as published but for its distance (prompts alone)."""
    method = DMD(
        ONE,
        STUDENT_LEVELS,
        fake=FakeScore(LEVELS, EPS),
        pairs=Pairs(500_000, CFG(MultiStep(Whole(), 50, "dpm++"), 3.0)),
        guidance=Kappas(real=3.0),
    )
    return replace(
        dmd2_sd15(),
        method=method,
        steps=20_000,
        batch=2304,
        accumulate=72,
        optim=adamw(1e-5, warmup=500),
    )


def _vsd(guidance: Guidance, alpha: float, ema: EMA) -> Run:
    method = VSD(
        ONE,
        STUDENT_LEVELS,
        fake=FakeScore(LEVELS, Power(4, -2)),
        fake_rate=1000.0,
        guidance=guidance,
    )
    return Run(
        method,
        SAME,
        Prompts(),
        steps=20_000,
        batch=64,
        accumulate=4,
        optim=Optim(1e-6, betas=(0.9, 0.999), clip=1.0),
        ema=ema,
        lora=LoRA(64, alpha),
    )


def swiftbrush_sd21() -> Run:
    """SwiftBrush on Stable Diffusion 2.1, as published but for its adapters (prompts alone)."""
    return _vsd(Kappas(fake=4.5, real=4.5), 108.0, EMA(50_000))


def snoopi_sd15() -> Run:
    """SNOOPI's PG-SB on Stable Diffusion 1.5, as far as published (prompts alone)."""
    return _vsd(RandomLSG(0.5, 4.0), 128.0, LAST)


def snoopi_sd21() -> Run:
    """SNOOPI's PG-SB on Stable Diffusion 2.1, as far as published (prompts alone)."""
    return snoopi_sd15()


def _f_distill(run: Run, ratio: int, kappa: float, gan: float) -> FDistill:
    judge = Critic(LEVELS, EPS, Power(), average="sample", pool="learned", features="teacher")
    return FDistill(
        run.method.sampler,
        times=Whole(1, 999),
        weight=L1(1e-6),
        fake=judge,
        ratio=ratio,
        gan=gan,
        guidance=Kappas(real=kappa),
    )


def f_distill_sd15() -> Run:
    """f-distill on Stable Diffusion 1.5, as far as published (--domain "Captions('FOLDER')")."""
    run = dmd2_sd15()
    return replace(run, method=_f_distill(run, 10, 1.75, 1e-3), domain=Captions())


def f_distill_sdxl() -> Run:
    """f-distill on SDXL in four steps, as far as published (--domain "Captions('FOLDER')")."""
    run = dmd2_sdxl()
    return replace(run, method=_f_distill(run, 5, 8.0, 5e-3))


def decoupled_dmd_sdxl() -> Run:
    """Decoupled DMD on SDXL in four steps, as far as published (prompts alone)."""
    method = DecoupledDMD(
        FOUR,
        8.0,
        STUDENT_LEVELS,
        augmentation_times=STUDENT_LEVELS,
        fake=FakeScore(LEVELS, EPS),
    )
    return replace(dmd2_sdxl(), method=method, domain=Prompts())


def disback_sdxl() -> Run:
    """DisBack on SDXL in one step, as far as published (prompts alone)."""
    method = DisBack(
        ONE,
        STUDENT_LEVELS,
        fake=FakeScore(LEVELS, EPS),
        targets=9,
        record_steps=100,
        target_steps=1000,
        ratio=5,
        guidance=Kappas(real=8.0),
    )
    steps = method.recording + (method.targets + 1) * method.target_steps
    return replace(dmd2_sdxl(), method=method, domain=Prompts(), steps=steps, accumulate=128)


def cdm_sd3() -> Run:
    """CDM on SD3 in four steps, as far as published (prompts alone)."""
    levels = Uniform(0.02, 0.98)
    adam = Optim(1e-5, betas=(0.9, 0.999), weight_decay=1e-4)
    method = CDM(FLOW, kappa=8.0, longest=28, times=levels, fake=FakeScore(levels, VELOCITY))
    return _on_flow(
        method,
        128,
        8,
        4000 // 2,
        optim=adam,
        fake_optim=replace(adam, lr=5e-6),
        ema=average(0.999, 128),
    )


def tdm_pixart() -> Run:
    """TDM on PixArt-alpha at 512 pixels in four steps, as published but batch (prompts alone)."""
    method = TDM(
        FewStep(899.0, 4, "ddim", unit=True),
        Whole(20, 889),
        huber=1e-3,
        fake_weight=MinSNR(5.0),
        fake_rate=5.0,
        guidance=Kappas(real=4.5),
    )
    return Run(
        method,
        SAME,
        Prompts(),
        steps=500,
        batch=256,
        accumulate=256,
        optim=Optim(4e-6, betas=(0.0, 0.95), weight_decay=0.01, clip=1.0),
        ema=LAST,
        precision="fp16",
    )


def _levels(first: int, last: int = 27) -> Discrete:
    """Levels of these numbers among the 28 of SD3's sampler, from the noisiest on, at shift 3."""
    least = 3 * 0.001 / (1 + 2 * 0.001)
    even = [1 - (1 - least) * number / 27 for number in range(last, first - 1, -1)]
    return Discrete(tuple(3 * u / (1 + 2 * u) for u in even))


def swd_sd35() -> Run:
    """SwD on SD3.5 medium in four steps, but its sizes (--domain "Captions('FOLDER')")."""
    method = SwD(
        ScaleWise((1.0, 0.8959, 0.7371, 0.6022), (2, 2, 1, 1)),
        _levels(12),
        mmd_times=_levels(18),
        fake=FakeScore(_levels(12), Power()),
        guidance=Kappas(real=7.0),
    )
    attention = "to_q", "to_k", "to_v", "to_out.0"
    added = "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
    lora = LoRA(64, targets=(*attention, *added, "ff.net.*", "ff_context.net.*"))
    return _on_flow(method, 64, 8, 3000, domain=Captions(), optim=adamw(5e-6), lora=lora)


def phased_dmd_qwen_image() -> Run:
    """Phased DMD on Qwen-Image, four steps in two phases, as far as published (prompts alone)."""
    method = PhasedDMD(
        FLOW,
        times=Uniform(),
        weight=Power(2, -2),
        fake_weight=VELOCITY,
        ratio=5,
        guidance=Kappas(real=4.5),
        matching="final",
    )
    steps = method.phases * method.phase_steps
    return _on_flow(method, 64, 64, steps, optim=adamw(4e-7))


def self_e_t2i() -> Run:
    """Self-E on a flow, as published but its start (needs --domain "Captions('FOLDER')")."""
    method = SelfE(
        Jumps(1.0, 8), kappa=10.0, anneal=300_000, auxiliary_from=550_000, weight=VELOCITY
    )
    return _on_flow(
        method,
        1024,
        64,
        710_000,
        domain=Captions(),
        optim=Optim(3e-4, betas=(0.9, 0.95), warmup=1000, decay="linear"),
        ema=average(0.9999, 1024),
    )
