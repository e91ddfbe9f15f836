"""The published runs of SiD, SiDA, SiD2A and SIM on EDM and EDM2 networks, as released.

    fewstep distill sid_cifar10_uncond --teacher edm-cifar10-32x32-uncond-vp.pkl

Zhou et al. 2024, https://arxiv.org/abs/2404.04057 and https://arxiv.org/abs/2410.14919. The
published losses are sums over pixels, times a scale, over the batch; here they are means. Adam
does not see the factor but through its eps, and clipping by value does, so both are divided by it.
Parts of a batch are those of one device; with N processes pass --accumulate divided by N. SiDA's
adversarial loss is averaged within a part, so there the size of a part is a setting like others.
SiD2A starts from a SiD student, given by --init.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from fewstep.diffusion.time_distributions import LogNormal
from fewstep.distillation.augment import Augment
from fewstep.distillation.critic import Critic
from fewstep.distillation.fake_score import FakeScore
from fewstep.domains.latents import LatentMoments
from fewstep.domains.pictures import Pictures
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.methods.sim import SIM
from fewstep.runs.run import Run
from fewstep.teachers.network_config import published_model
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim

MILLION = 1_000_000
GENERATOR_SCALE = 100.0
"""lsg, the published scale of the student's loss."""
Kind = Literal["sid", "sida", "sid2a"]
KINDS: tuple[Kind, ...] = ("sid", "sida", "sid2a")


@dataclass(frozen=True)
class Setup:
    """One row of the published tables."""

    title: str
    network: dict[str, Any]
    """Constructor arguments of the teacher's network."""
    alpha: float
    batch: int
    part: int
    """Samples computed at once on a device by SiD, and by SiDA."""
    part_sida: int
    lr: float
    images: tuple[float, float, float]
    """Millions of pictures that SiD, SiDA and SiD2A see."""
    augment: float = 0.0
    halflife: float = 0.5
    """Of the moving average, in millions of pictures."""
    beta1: float = 0.0
    """Of the student's Adam in SiD; SiDA has 0."""
    fp16: bool = True
    class_name: str = "EDMPrecond"
    times: LogNormal = LogNormal()
    judging: float = 1.0
    """lsd, the published scale of the discriminator's loss."""
    logvar: bool = False

    @property
    def latent(self) -> bool:
        """Whether the network is EDM2's, which denoises latents."""
        return self.class_name == "Precond"


def song(size: int, channel_mult: list[int], dropout: float, classes: int = 0) -> dict[str, Any]:
    """DDPM++ as EDM trained it."""
    arguments: dict[str, Any] = {
        "img_resolution": size,
        "img_channels": 3,
        "label_dim": classes,
        "augment_dim": 9,
    }
    arguments |= {"model_type": "SongUNet", "embedding_type": "positional", "model_channels": 128}
    arguments |= {"encoder_type": "standard", "decoder_type": "standard", "channel_mult_noise": 1}
    return arguments | {
        "resample_filter": [1, 1],
        "channel_mult": channel_mult,
        "dropout": dropout,
    }


def edm2(channels: int, dropout: float) -> dict[str, Any]:
    """EDM2 for the latents of ImageNet 512."""
    arguments = {"img_resolution": 64, "img_channels": 4, "label_dim": 1000, "sigma_data": 0.5}
    return arguments | {"model_channels": channels, "dropout": dropout, "logvar_channels": 128}


ADM = {
    **{"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet"},
    **{"model_channels": 192, "channel_mult": [1, 2, 3, 4], "dropout": 0.1, "augment_dim": 0},
}
CIFAR, FACES = [2, 2, 2], [1, 2, 2, 2]


def latent(size: str, channels: int, dropout: float, part: int, sid: float, more: float) -> Setup:
    """An EDM2 row: ImageNet 512 at one of the published sizes."""
    return Setup(
        f"ImageNet 512x512, EDM2-{size}",
        edm2(channels, dropout),
        alpha=1.0,
        batch=2048,
        part=part,
        part_sida=part,
        lr=5e-5,
        images=(sid, sid, more),
        halflife=2.0,
        class_name="Precond",
        times=LogNormal(-0.4, 1.0),
        judging=100.0,
        logvar=True,
    )


_CIFAR = {"alpha": 1.2, "batch": 256, "part": 16, "part_sida": 32, "lr": 1e-5, "augment": 0.12}
_FACES = {"batch": 512, "part": 32, "part_sida": 64, "augment": 0.15, "images": (500, 200, 100)}
SETUPS = {
    "cifar10_uncond": Setup(
        "CIFAR-10, unconditional",
        song(32, CIFAR, 0.13),
        **_CIFAR,  # type: ignore[arg-type]
        images=(500, 300, 100),
        fp16=False,
    ),
    "cifar10_cond": Setup(
        "CIFAR-10, class-conditional",
        song(32, CIFAR, 0.13, 10),
        **_CIFAR,  # type: ignore[arg-type]
        images=(800, 300, 100),
        fp16=False,
    ),
    "imagenet64": Setup(
        *("ImageNet 64x64", ADM, 1.2, 8192, 16, 32, 4e-6, (1000, 300, 100)), halflife=2.0
    ),
    "ffhq64": Setup(
        "FFHQ 64x64",
        song(64, FACES, 0.05),
        alpha=1.2,
        lr=1e-5,
        beta1=0.9,
        **_FACES,  # type: ignore[arg-type]
    ),
    "afhqv2_64": Setup(
        "AFHQv2 64x64",
        song(64, FACES, 0.05),
        alpha=1.0,
        lr=5e-6,
        **_FACES,  # type: ignore[arg-type]
    ),
    "edm2_xs": latent("XS", 128, 0.0, 64, 200, 30),
    "edm2_s": latent("S", 192, 0.0, 64, 200, 80),
    "edm2_m": latent("M", 256, 0.1, 32, 200, 200),
    "edm2_l": latent("L", 320, 0.1, 32, 200, 55),
    "edm2_xl": latent("XL", 384, 0.1, 16, 200, 50),
    "edm2_xxl": latent("XXL", 448, 0.1, 2, 100, 30),
}


def _run(kind: Kind, s: Setup) -> Run:
    """The run of one method on one data set."""
    model = published_model(s.class_name, s.network)
    pixels, eps = math.prod(model.shape), 1e-6 if s.fp16 else 1e-8
    score = {"times": s.times, "augment": Augment(s.augment) if s.augment else None}
    after = [1 + int(images / s.batch) for images in (100_000, 200_000)]
    method: SiD | SiDA
    if kind == "sid":
        method = SiD(alpha=s.alpha, fake=FakeScore(logvar=s.logvar, **score))  # type: ignore
    else:
        method = SiDA(
            fake=Critic(scale=s.judging, logvar=s.logvar, **score),  # type: ignore[arg-type]
            student_from=after[0],
            adversarial_from=after[1],
        )
    clip = 1 / pixels if kind != "sid" and not s.latent else math.inf
    steps = math.ceil(s.images[KINDS.index(kind)] * MILLION / s.batch)
    return Run(
        method=method,
        model=model,
        domain=LatentMoments() if s.latent else Pictures(),
        steps=steps,
        batch=s.batch,
        accumulate=s.batch // (s.part if kind == "sid" else s.part_sida),
        optim=Optim(
            s.lr,
            betas=(s.beta1 if kind == "sid" else 0.0, 0.999),
            eps=eps / (pixels * GENERATOR_SCALE),
        ),
        fake_optim=Optim(s.lr, eps=eps / pixels, clip_value=clip),
        ema=EMA(s.halflife * MILLION),
        sample_every=max(1, MILLION // s.batch),
        save_every=max(1, MILLION // s.batch),
        precision="fp16" if s.fp16 else "fp32",
    )


def _recipe(kind: Kind, s: Setup) -> Callable[[], Run]:
    def make() -> Run:
        return _run(kind, s)

    name = {"sid": "SiD", "sida": "SiDA", "sid2a": "SiD2A"}[kind]
    domain = "LatentMoments" if s.latent else "Pictures"
    needs = "no data" if kind == "sid" else f"needs --domain \"{domain}('PATH')\""
    needs += " and --init SID_STUDENT" if kind == "sid2a" else ""
    make.__doc__ = f"{name} on {s.title}, as published ({needs})."
    return make


def sim_cifar10_uncond() -> Run:
    """SIM on CIFAR-10, unconditional; the paper gives its batch and rates, the rest is SiD's."""
    return _sim("cifar10_uncond")


def sim_cifar10_cond() -> Run:
    """SIM on CIFAR-10, class-conditional; the paper gives batch and rates, the rest is SiD's."""
    return _sim("cifar10_cond")


def _sim(name: str) -> Run:
    run = _run("sid", SETUPS[name])
    assert isinstance(run.method, SiD)
    assert run.fake_optim is not None
    method = SIM(fake=run.method.fake)
    eps = run.fake_optim.eps
    return replace(run, method=method, optim=replace(run.optim, eps=eps))


RECIPES = {f"{kind}_{name}": _recipe(kind, s) for kind in KINDS for name, s in SETUPS.items()}
"""What `fewstep recipes` lists."""
