"""Methods with statistics, stages and measures, in several processes and in parts of nets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Karras
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Method
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.f_distill import FDistill
from fewstep.methods.mean_flow import MeanFlow
from fewstep.methods.optimal_steps import OptimalSteps
from fewstep.methods.progressive import ProgressiveDistillation
from fewstep.nets.mlp import MLP
from fewstep.storage import checkpoint
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training import distributed
from fewstep.training.ema import EMA
from fewstep.training.loop import State, train
from fewstep.training.optim import Optim
from fewstep.training.sharding import shard
from tests.processes import results

MODEL = Model(MLP(width=16, blocks=1), (2,), sigma_data=0.7)
METHODS: tuple[Method, ...] = (
    FDistill(FewStep(2.5), ratio=1, bins=3, rate=0.5),
    ProgressiveDistillation(start=2, stage_steps=2),
    MeanFlow(),
    OptimalSteps(Heun(Karras(0.02, 2.5), 5, 1), 2),
)
each_method = pytest.mark.parametrize(
    "method",
    [*METHODS, pytest.param(DiffInstruct(ratio="auto"), marks=pytest.mark.slow)],
    ids=lambda m: type(m).__name__,
)


def normal(draws: Draws) -> Batch:
    return Batch(draws.normal("z", (2,)), None, draws.normal("x0", (2,)), draws)


def noise(draws: Draws) -> Batch:
    return Batch(draws.normal("z", (2,)), None, None, draws)


def run(method: Method, accumulate: int = 1, parts: int | None = None) -> dict[str, Tensor]:
    """All tensors after four steps of 16 samples."""
    with distributed.process_group():
        teacher = GaussianMixture.ring(3)
        state = State.init(method, teacher, MODEL.build(1))
        for net in (*state.nets.values(), state.average) if parts is not None else ():
            shard(net, parts or 0)
        source = normal if method.needs_data else noise
        settings: Any = {"batch": 16, "optim": Optim(1e-2, (0.9, 0.99), eps=1e-3), "steps": 4}
        settings |= {"ema": EMA(100), "state": state, "accumulate": accumulate}
        for _ in train(method, teacher, MODEL.build(1), source, **settings):
            pass
        return {
            f"{part}.{name}": distributed.full_tensor(t).detach().clone()
            for part, named in checkpoint.tensors(state).items()
            for name, t in named.items()
        }


@each_method
def test_two_processes_have_the_bits_of_one_that_accumulates(
    method: Method, tmp_path: Path
) -> None:
    """Sums are over all samples, and every process begins the same stages."""
    alone = run(method, accumulate=2)
    for found in results(2, tmp_path, run, method):
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone)


@each_method
def test_nets_in_parts(method: Method, tmp_path: Path) -> None:
    """Targets, averages and restarted optimisers of sharded nets hold the same numbers."""
    alone = run(method, accumulate=2)
    for found in results(2, tmp_path, run, method, 1, 0):
        assert found.keys() == alone.keys()
        for name in alone:
            torch.testing.assert_close(found[name], alone[name], rtol=2e-5, atol=2e-6)
