"""The published runs, pinned to the tables of the papers' code, number by number.

Columns: alpha, batch, samples a part for SiD and SiDA, lr, fp16, dropout, augmentation, half-life
of the average in millions of pictures, beta_1 of the student, millions of pictures for SiD, SiDA
and SiD2A, parameters of the network in millions (as the papers of EDM and EDM2 give them).
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.config import decode, encode
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, LogNormal
from fewstep.distillation.augment import Augment
from fewstep.distillation.critic import Critic
from fewstep.distillation.fake_score import FakeScore
from fewstep.losses.distance import PseudoHuber
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.recipes.registry import every
from fewstep.recipes.sid_edm import RECIPES, SETUPS
from fewstep.runs.run import Run
from fewstep.training.ema import EMA

TABLE = """
cifar10_uncond 1.2  256 16 32 1e-5 0 .13 .12 .5 0   500 300 100 56
cifar10_cond   1.2  256 16 32 1e-5 0 .13 .12 .5 0   800 300 100 56
imagenet64     1.2 8192 16 32 4e-6 1 .10 0   2  0  1000 300 100 296
ffhq64         1.2  512 32 64 1e-5 1 .05 .15 .5 .9  500 200 100 62
afhqv2_64      1.0  512 32 64 5e-6 1 .05 .15 .5 0   500 200 100 62
edm2_xs        1.0 2048 64 64 5e-5 1 0   0   2  0   200 200  30 125
edm2_s         1.0 2048 64 64 5e-5 1 0   0   2  0   200 200  80 280
edm2_m         1.0 2048 32 32 5e-5 1 .10 0   2  0   200 200 200 498
edm2_l         1.0 2048 32 32 5e-5 1 .10 0   2  0   200 200  55 777
edm2_xl        1.0 2048 16 16 5e-5 1 .10 0   2  0   200 200  50 1119
edm2_xxl       1.0 2048  2  2 5e-5 1 .10 0   2  0   100 100  30 1523
"""
ROWS = {
    name: [float(cell) for cell in cells]
    for name, *cells in map(str.split, TABLE.split("\n")[1:-1])
}
KINDS = ("sid", "sida", "sid2a")
each = pytest.mark.parametrize("name", ROWS)


def common(run: Run, name: str, part: float, images: float) -> tuple[int, bool]:
    """What all three methods of a row share; pixels of a sample, and whether it is EDM2."""
    _, batch, _, _, lr, fp16, dropout, _, halflife, _, _, _, _, _ = ROWS[name]
    latent = name.startswith("edm2")
    pixels = math.prod(run.model.shape)
    assert run.batch == batch
    assert run.batch / run.accumulate == part
    assert (run.steps - 1) * batch < images * 1e6 <= run.steps * batch
    assert run.precision == ("fp16" if fp16 else "fp32")
    assert run.ema == EMA(halflife * 1e6, 0.05)
    network: Any = run.model.net
    assert network.kwargs()["dropout"] == dropout
    assert network.class_name == ("Precond" if latent else "EDMPrecond")
    eps = 1e-6 if fp16 else 1e-8
    fake = run.fake_optim
    assert fake is not None
    assert (fake.lr, run.optim.lr) == (lr, lr)
    assert (fake.betas, fake.warmup, fake.decay, fake.clip) == (
        (0, 0.999),
        0,
        "constant",
        math.inf,
    )
    assert fake.eps * pixels == pytest.approx(eps)
    assert run.optim.eps * pixels * 100 == pytest.approx(eps)
    assert (run.optim.clip_value, run.optim.clip, run.optim.betas[1]) == (
        math.inf,
        math.inf,
        0.999,
    )
    return pixels, latent


def learning(fake: FakeScore | Critic, name: str) -> None:
    """The fake score's own settings."""
    latent = name.startswith("edm2")
    assert fake.times == (LogNormal(-0.4, 1.0) if latent else LogNormal(-1.2, 1.2))
    assert fake.augment == (Augment(ROWS[name][7]) if ROWS[name][7] else None)
    assert fake.logvar == latent


@each
def test_sid(name: str) -> None:
    run = RECIPES[f"sid_{name}"]()
    common(run, name, ROWS[name][2], ROWS[name][10])
    method = run.method
    assert isinstance(method, SiD)
    assert method.alpha == ROWS[name][0]
    assert method == SiD(alpha=method.alpha, fake=method.fake)  # the rest are defaults
    assert (method.sampler, method.times) == (FewStep(t_init=2.5), Karras(0.002, 80, 7, 800))
    assert run.optim.betas[0] == ROWS[name][9]
    learning(method.fake, name)
    assert run.fake_optim is not None
    assert run.fake_optim.clip_value == math.inf


@each
@pytest.mark.parametrize("kind", KINDS[1:])
def test_sida(kind: str, name: str) -> None:
    run = RECIPES[f"{kind}_{name}"]()
    pixels, latent = common(run, name, ROWS[name][3], ROWS[name][10 + KINDS.index(kind)])
    method = run.method
    assert isinstance(method, SiDA)
    assert (method.alpha, method.gan, method.share) == (1.0, 0.01 / 100, 0.5)
    assert method.fake.scale == (100.0 if latent else 1.0)
    assert method.fake.average == "batch"
    assert (method.student_from - 1) * run.batch <= 100_000 < method.student_from * run.batch
    assert (method.adversarial_from - 1) * run.batch <= 200_000
    assert method.adversarial_from * run.batch > 200_000
    assert run.optim.betas[0] == 0
    learning(method.fake, name)
    assert run.fake_optim is not None
    clip = run.fake_optim.clip_value
    assert clip == math.inf if latent else clip * pixels == pytest.approx(1)


@each
def test_the_networks_are_of_the_published_size(name: str) -> None:
    """And there are as many classes and pixels as the data set has."""
    model = RECIPES[f"sid_{name}"]().model
    with torch.device("meta"):
        network = model.net.build(model.shape, model.classes)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert abs(millions - ROWS[name][13]) < 0.6
    conditional = {"cifar10_cond": 10, "imagenet64": 1000} | {n: 1000 for n in ROWS if "edm2" in n}
    assert model.classes == conditional.get(name, 0)
    size = 32 if "cifar" in name else 64
    assert model.shape == ((4 if "edm2" in name else 3), size, size)


def test_sim() -> None:
    for name in ("cifar10_uncond", "cifar10_cond"):
        run, sid = every()[f"sim_{name}"](), RECIPES[f"sid_{name}"]()
        method: Any = run.method
        assert (run.batch, run.optim.lr, method.distance) == (256, 1e-5, PseudoHuber())
        assert run.optim.eps * 3072 == pytest.approx(1e-8)
        assert replace(run, method=sid.method, optim=sid.optim) == sid


def test_all_are_listed_and_stored_as_they_are() -> None:
    assert {f"{kind}_{name}" for kind in KINDS for name in SETUPS} == set(RECIPES) <= set(every())
    assert set(SETUPS) == set(ROWS)
    for name in ("sid_cifar10_cond", "sida_imagenet64", "sid2a_edm2_xs", "sim_cifar10_cond"):
        make = every()[name]
        assert decode(encode(make())) == make()
        assert (inspect.getdoc(make) or "").endswith(".")
