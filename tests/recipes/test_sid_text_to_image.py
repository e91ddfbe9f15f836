"""The published text-to-image runs, pinned to the papers' and their code's tables, by number.

Columns: t_init, steps, batch, lr, millions of pictures, half-life of the average in millions,
precision, kappa (0: Zero-CFG), latents of a sample, lsg.
"""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from typing import Any

import pytest
import torch

from fewstep.config import decode, encode
from fewstep.diffusion.noise_path import VP, coefficients
from fewstep.diffusion.samplers import FewStep
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.guidance_scales import LSG, ZeroCFG
from fewstep.domains.prompts import Prompts
from fewstep.losses.distance import PseudoHuber
from fewstep.losses.weight import L1, Power
from fewstep.methods.sid import SiD
from fewstep.methods.sim import SIM
from fewstep.recipes.registry import every
from fewstep.recipes.sid_text_to_image import RECIPES
from fewstep.recipes.text_to_image import SAME, t2i, t2i_flow
from fewstep.training.ema import EMA
from tests.command import fewstep

TABLE = """
sid_lsg_sd15 625 1 512 1e-6 10 .05 fp32 1.5  16384   1
sid_lsg_sd21 625 1 512 1e-6 10 .05 fp32 1.5  16384   1
sid_sdxl     999 4 512 1e-6  1 .05 fp16 0    65536   1
sid_sd3        1 4 256 1e-6  1 0   bf16 4.5 262144 100
sid_sana       1 4 256 5e-6  1 0   bf16 4.5  32768 100
sid_flux       1 4 256 1e-6  1 0   bf16 4.5  65536 100
sim_pixart   440 1 256 1e-5 10 .05 bf16 1.5  16384   1
"""
ROWS = {name: cells for name, *cells in map(str.split, TABLE.split("\n")[1:-1])}
FLOWS = ("sid_sd3", "sid_sana", "sid_flux")
each = pytest.mark.parametrize("name", ROWS)


@each
def test_the_run(name: str) -> None:
    t_init, steps, batch, lr, images, halflife, precision, _, latents, lsg = ROWS[name]
    run = RECIPES[name]()
    sampler = run.method.sampler
    assert isinstance(sampler, FewStep)
    assert (sampler.t_init, sampler.steps, sampler.noise) == (float(t_init), int(steps), "fresh")
    assert (run.batch, run.accumulate, run.precision) == (int(batch), int(batch), precision)
    assert (run.steps - 1) * run.batch < float(images) * 1e6 <= run.steps * run.batch
    assert run.ema == EMA(float(halflife) * 1e6, 0.05)
    assert (run.model, run.domain) == (SAME, Prompts())
    assert run.recompute == (name == "sid_sdxl")
    fake, student = run.fake_optim, run.optim
    assert fake is not None
    for optim in (fake, student):
        assert (optim.lr, optim.betas, optim.weight_decay) == (float(lr), (0.0, 0.999), 0.0)
        assert (optim.warmup, optim.decay) == (0, "constant")
        assert (optim.clip, optim.clip_value) == (math.inf, math.inf)
    assert fake.eps * int(latents) == pytest.approx(1e-8)
    assert student.eps * int(latents) * int(lsg) == pytest.approx(1e-8)


@each
def test_the_method(name: str) -> None:
    method: Any = RECIPES[name]().method
    kappa = float(ROWS[name][7])
    guidance = LSG(kappa) if kappa else ZeroCFG()
    assert (method.guidance, guidance.drop, method.matching) == (guidance, 0.1, "uniform")
    u = (torch.arange(960_000, dtype=torch.float64) + 0.5) / 960_000
    assert method.fake.times == method.times
    t = method.times.quantile(u)
    if name in FLOWS:  # median and 5 to 95 %
        assert float(t.median()) == pytest.approx(2 / 3, abs=1e-3)
        assert torch.quantile(t, torch.tensor([0.05, 0.95]).double()).tolist() == pytest.approx(
            [0.126, 0.965], abs=1e-3
        )
        assert isinstance(method, SiD)
        assert (method.alpha, method.weight) == (1.0, Power(1, 0))  # 1 - t
        assert method.fake == FakeScore(method.times, Power(0, -2))  # |velocity error|^2
        return
    assert Counter(t.tolist()) == dict.fromkeys(range(20, 980), 1000)
    assert method.fake == FakeScore(method.times, Power(2, -2))  # |eps error|^2
    if isinstance(method, SIM):
        assert (method.distance, method.scale) == (PseudoHuber(), Power())
    else:
        assert (method.alpha, method.weight) == (1.0, L1(1e-5))


def test_where_one_step_starts() -> None:
    """sigma / alpha = 2.5 in both families, as the papers and their code have it."""
    for name, path in (("sid_lsg_sd15", VP()), ("sim_pixart", VP(1e-4, 0.02, schedule="linear"))):
        sampler: Any = RECIPES[name]().method.sampler
        t = torch.tensor([sampler.t_init * (path.t_max / 999)], dtype=torch.float64)
        alpha, sigma = coefficients(path, torch.zeros(1, 1, dtype=torch.float64), t)
        assert float(sigma / alpha) == pytest.approx(2.5, abs=0.01)


@each
def test_listed_stored_and_resolved_without_a_teacher(name: str) -> None:
    assert decode(encode(RECIPES[name]())) == RECIPES[name]()
    assert name in every()
    doc = inspect.getdoc(RECIPES[name]) or ""
    assert len(f"{name:22}{doc}") < 110
    done = fewstep("distill", name, "--dry-run", "--batch", "8", "--accumulate", "4")
    assert done.code == 0, done.err
    text, _, cost = done.out.rpartition("}\n")
    run = json.loads(text + "}")
    assert (run["batch"], run["accumulate"], run["optim"]["lr"]) == (8, 4, float(ROWS[name][3]))
    assert cost == "what it costs is known with a teacher: pass --teacher too\n"


def test_the_general_recipes_are_of_the_same_method() -> None:
    assert t2i().method == RECIPES["sid_lsg_sd15"]().method
    assert t2i_flow().method == RECIPES["sid_sana"]().method
