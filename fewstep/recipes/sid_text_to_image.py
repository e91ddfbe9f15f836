"""The published text-to-image runs of SiD-LSG, few-step SiD and SIM, from prompts alone.

    fewstep distill sid_lsg_sd15 --teacher stable-diffusion-v1-5 --prompts prompts.txt

SiD-LSG (Zhou et al. 2024, https://arxiv.org/abs/2406.01561): one step from t = 625, whole
timesteps 20 .. 979, four equal scales, the fake score's loss on eps. Few-step SiD on SDXL (Zhou et
al. 2025, https://arxiv.org/abs/2505.12674) is the same with four steps and Zero-CFG; its batch,
rate and average are not published and SiD-LSG's here. On flows (Zhou et al. 2025,
https://arxiv.org/abs/2509.25127) t is log-normal in its odds around 2, the student's loss weighted
by 1 - t, the fake score's that of the velocity; all batches are SANA's. SIM on PixArt-alpha (Luo
et al. 2024, https://arxiv.org/abs/2410.16794) starts at sigma = 2.5, t = 440 there; only that and
the distance are published, the rest is SiD-LSG's with SIM's batch and rate on CIFAR-10. It starts
from z, not .93 z, since PixArt's stock pipeline does.

Published losses are sums over latents times a scale; here they are means, which Adam sees through
its eps alone, so that is divided by both (see fewstep.recipes.sid_edm). A batch is computed
sample by sample; larger parts change nothing but the memory: --accumulate 64. How long flows were
trained is not published: a million pictures, after which SDXL's alignment had peaked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import LogitNormal, Whole
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.guidance_scales import LSG, Guidance, ZeroCFG
from fewstep.domains.prompts import Prompts
from fewstep.losses.weight import Power
from fewstep.methods.sid import SiD
from fewstep.methods.sim import SIM
from fewstep.recipes.text_to_image import SAME
from fewstep.runs.run import Run
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim
from fewstep.training.precision import Precision

MILLION = 1_000_000


@dataclass(frozen=True)
class Setup:
    """One row of the published tables."""

    title: str
    latent: tuple[int, int, int]
    """Shape of a sample at the published resolution."""
    sampler: FewStep
    guidance: Guidance
    batch: int = 512
    lr: float = 1e-6
    images: float = 1.0
    """Millions of pictures."""
    precision: Precision = "fp32"
    halflife: float = 0.05
    """Of the moving average, in millions of pictures; 0: the last weights."""
    scale: float = 1.0
    """lsg, the published scale of the student's loss."""
    recompute: bool = False
    told: str = "as published"
    """What of it is published."""


FOUR, FLOW = FewStep(999.0, 4, unit=True), FewStep(1.0, 4)
SETUPS = {
    **{
        f"sid_lsg_{name}": Setup(
            f"SiD-LSG on {title} in one step", (4, 64, 64), FewStep(625.0), LSG(1.5), images=10.0
        )
        for name, title in (("sd15", "Stable Diffusion 1.5"), ("sd21", "Stable Diffusion 2.1"))
    },
    "sid_sdxl": Setup(
        "SiD on SDXL in four steps",
        (4, 128, 128),
        FOUR,
        ZeroCFG(),
        precision="fp16",
        recompute=True,
        told="with SiD-LSG's batch and rate",
    ),
    **{
        f"sid_{name}": Setup(
            f"SiD on {title} in four steps",
            latent,
            FLOW,
            LSG(4.5),
            batch=256,
            lr=lr,
            precision="bf16",
            halflife=0.0,
            scale=100.0,
        )
        for name, title, latent, lr in (
            ("sd3", "SD3", (16, 128, 128), 1e-6),
            ("sana", "SANA", (32, 32, 32), 5e-6),
            ("flux", "FLUX at 512 pixels", (16, 64, 64), 1e-6),
        )
    },
    "sim_pixart": Setup(
        "SIM on PixArt-alpha in one step",
        (4, 64, 64),
        FewStep(440.0, unit=True),
        LSG(1.5),
        batch=256,
        lr=1e-5,
        images=10.0,
        precision="bf16",
        told="with SiD-LSG's schedule",
    ),
}


def _method(name: str, s: Setup) -> SiD | SIM:
    """SiD on betas or on a flow, or SIM."""
    if s.sampler == FLOW:
        law = LogitNormal(math.log(2), 1.6)
        fake = FakeScore(law, Power(0, -2))
        return SiD(s.sampler, 1.0, law, Power(1, 0), fake, s.guidance)
    times = Whole(20, 979)
    fake = FakeScore(times, Power(2, -2))
    if name.startswith("sim"):
        return SIM(s.sampler, times=times, fake=fake, guidance=s.guidance)
    return SiD(s.sampler, alpha=1.0, times=times, fake=fake, guidance=s.guidance)


def _recipe(name: str, s: Setup) -> Callable[[], Run]:
    def make() -> Run:
        eps = 1e-8 / math.prod(s.latent)
        return Run(
            method=_method(name, s),
            model=SAME,
            domain=Prompts(),
            steps=math.ceil(s.images * MILLION / s.batch),
            batch=s.batch,
            accumulate=s.batch,
            optim=Optim(s.lr, eps=eps / s.scale),
            fake_optim=Optim(s.lr, eps=eps),
            ema=EMA(s.halflife * MILLION),
            sample_every=100,
            save_every=100,
            precision=s.precision,
            recompute=s.recompute,
        )

    make.__doc__ = f"{s.title}, {s.told} (prompts alone)."
    return make


RECIPES = {name: _recipe(name, s) for name, s in SETUPS.items()}
"""What `fewstep recipes` lists."""
