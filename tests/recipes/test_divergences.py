"""The published runs of DMD, f-distill and Uni-Instruct, pinned to the papers' tables by number.

The tables are written from the papers and their code, not from the recipes.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.config import decode, encode
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import TimeLaw
from fewstep.losses.weight import L1, EDMWeight
from fewstep.methods.dmd import DMD
from fewstep.methods.f_distill import FDistill
from fewstep.methods.uni_instruct import UniInstruct
from fewstep.plan.meta_step import prepared, rehearsed
from fewstep.recipes import divergences
from fewstep.recipes.registry import by_module, in_module
from fewstep.runs.run import Run
from fewstep.teachers.network_config import published_model
from fewstep.training.ema import EMA
from tests.recipes.pinned import differing, rows

RECIPES = in_module(divergences)

COLUMNS = (
    *("batch", "student", "fake", "beta1", "beta2", "decay", "clip", "warmup", "ratio", "first"),
    *("steps", "average", "low", "high"),
)
"""first: who is updated first; steps: of the student; average: what it keeps of itself in an
update, 0 for none; low, high: noise levels as shares of EDM's ladder."""
TABLE = """
dmd_cifar10_cond       392 5e-5 5e-5 .9 .999 .01  10 500 1 student 300000 0     .02 .98
dmd_cifar10_uncond     392 5e-5 5e-5 .9 .999 .01  10 500 1 student 300000 0     .02 .98
dmd_imagenet64         336 2e-6 2e-6 .9 .999 .01  10 500 1 student 350000 0     .02 .98
f_distill_cifar10_cond 2048 1e-4 1e-4 .9 .999 .01 10   0 5 fake     20000 .9999 0    1
f_distill_imagenet64    512 2e-6 2e-6 .9 .999 .01 10   0 5 fake    120000 .9999 0    1
"""
ROWS = rows(TABLE, COLUMNS)
LOOSE = dict.fromkeys(("low", "high"), 1.5e-3)
"""Quantiles of a time law, to the digits that are printed."""


def facts(run: Run) -> dict[str, Any]:
    """What the table says of a run, as the run has it."""
    method: Any = run.method
    turns = method.turns(run.steps - 1)
    nets = [turn.net for turn in turns]
    rates = {turn.net: turn.rate * run.optims(nets)[turn.net].lr for turn in turns}
    optim = run.optims(nets)["fake"]
    assert replace(optim, lr=1) == replace(run.optim, lr=1)
    share = ladder(method.times, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist()
    assert share[1] == pytest.approx((share[0] + share[2]) / 2, abs=1e-9)
    return {
        "batch": run.batch,
        "student": rates["student"],
        "fake": rates["fake"],
        "beta1": optim.betas[0],
        "beta2": optim.betas[1],
        "decay": optim.weight_decay,
        "clip": optim.clip,
        "warmup": optim.warmup,
        "ratio": nets.count("fake"),
        "first": nets[0],
        "steps": run.steps,
        "average": run.ema.decay(run.batch, run.batch),
        "low": share[0],
        "high": share[2],
    }


def ladder(law: TimeLaw, u: torch.Tensor) -> torch.Tensor:
    """Where the quantiles of a law lie on EDM's ladder of rho 7 from 0.002 to 80."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return (law.quantile(u) ** (1 / 7) - low) / (high - low)


@pytest.mark.parametrize("name", ROWS)
def test_the_run(name: str) -> None:
    assert differing(facts(RECIPES[name]()), ROWS[name], LOOSE) == []


@pytest.mark.parametrize("key", COLUMNS)
def test_a_wrong_number_is_seen(key: str) -> None:
    """Negative control: each number of the table in turn, a tenth larger."""
    row = dict(ROWS["f_distill_cifar10_cond"])
    row[key] = "student" if key == "first" else str(float(row[key]) * 1.1 + 0.01 * (key == "low"))
    row[key] = "1" if key == "warmup" else row[key]
    assert differing(facts(RECIPES["f_distill_cifar10_cond"]()), row, LOOSE) == [key]


@pytest.mark.parametrize(
    ("name", "pairs", "calls", "regression"),
    [
        ("dmd_cifar10_cond", 100_000, 35, 0.25),
        ("dmd_cifar10_uncond", 500_000, 35, 0.5),
        ("dmd_imagenet64", 25_000, 511, 0.25),
    ],
)
def test_dmd(name: str, pairs: int, calls: int, regression: float) -> None:
    """From pure noise; w = 1 / sigma^2 + 1 / 0.25 for the fake score, at all levels."""
    method = RECIPES[name]().method
    assert isinstance(method, DMD)
    assert (method.sampler, method.weight) == (FewStep(80.0), L1())
    assert (method.pairs.count, method.regression) == (pairs, regression)
    assert isinstance(method.pairs.sampler, Heun)
    assert method.pairs.sampler.calls == calls  # two a step, but the last
    assert method.fake.weight == EDMWeight(0.5)
    ends = ladder(method.fake.times, torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    assert ends == pytest.approx([0, 1], abs=1e-9)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert float(method.fake.weight(one, one, one, one / 4)) == pytest.approx(16 + 4)


@pytest.mark.parametrize(
    ("name", "family", "gan", "rate"),
    [("f_distill_cifar10_cond", "kl", 1e-3, 0.0), ("f_distill_imagenet64", "js", 3e-3, 0.5)],
)
def test_f_distill(name: str, family: str, gan: float, rate: float) -> None:
    """Ten bins, a ratio from 0.1 to 20, heads on the teacher; "it." are of both nets together."""
    method = RECIPES[name]().method
    assert isinstance(method, FDistill)
    assert (method.family, method.gan, method.rate) == (family, gan, rate)
    assert (method.bins, method.clip, method.weight) == (10, (0.1, 20.0), L1(1e-6))
    assert (method.fake.features, method.fake.loss) == ("teacher", "nonsaturating")
    assert method.fake.times == method.times
    assert method.sampler == FewStep(80.0)


@pytest.mark.parametrize(
    ("name", "batch", "lr", "classes"),
    [
        ("uni_instruct_cifar10_uncond", 256, 1e-5, 0),
        ("uni_instruct_cifar10_cond", 256, 1e-5, 10),
        ("uni_instruct_imagenet64", 8192, 4e-6, 1000),
    ],
)
def test_uni_instruct(name: str, batch: int, lr: float, classes: int) -> None:
    """SiDA's schedule: 300 million pictures, the critic alone to 100,000, SiD to 200,000."""
    run = RECIPES[name]()
    method, fake = run.method, run.fake_optim
    assert isinstance(method, UniInstruct)
    assert fake is not None
    assert (run.batch, run.optim.lr, fake.lr, run.model.classes) == (batch, lr, lr, classes)
    assert (run.optim.betas, fake.betas, run.optim.weight_decay) == ((0, 0.999), (0, 0.999), 0)
    assert (run.steps - 1) * batch < 300e6 <= run.steps * batch
    assert [turn.net for turn in method.turns(run.steps)] == ["fake", "student"]
    pixels = math.prod(run.model.shape)
    assert fake.clip_value * pixels == pytest.approx(1)  # of a loss summed over pixels
    assert (method.gan, method.weight, method.sampler) == (0.01 / 100, L1(), FewStep(2.5))
    for first, images in ((method.student_from, 1e5), (method.divergence_from, 2e5)):
        assert (first - 1) * batch <= images < first * batch
    assert run.ema == EMA(2e6 if batch > 256 else 5e5, 0.05)
    ends = ladder(method.times, torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    assert ends == pytest.approx([0, 0.8], abs=1e-9)


@pytest.mark.parametrize("name", RECIPES)
def test_each_begins(name: str) -> None:
    """Its last step with a small network; it is listed, and stored as it is."""
    run = RECIPES[name]()
    assert decode(encode(run)) == run
    small = {"model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    network: Any = run.model.net
    arguments = {**network.kwargs(), **small, "img_resolution": 8}
    model = published_model(network.class_name, arguments)
    state = rehearsed(prepared(replace(run, model=model, batch=2, accumulate=1)))
    assert state.step == run.steps
    assert all(p.isfinite().all() for p in state.nets["student"].parameters())


def test_listed_under_their_papers() -> None:
    title = "The published runs of DMD, f-distill and Uni-Instruct on EDM networks."
    assert by_module()[title] == RECIPES
    assert len(RECIPES) == len(ROWS) + 3
    assert all((inspect.getdoc(make) or "").endswith(").") for make in RECIPES.values())
