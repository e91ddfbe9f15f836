"""Any number of processes trains on the same samples to the same weights.

Sixteen samples a step, SiD on a ring of three, weights of about 0.3. Two processes average what
one process accumulates in two parts: the same two numbers are added, so all bits agree. Against
one undivided batch the order of a sum differs; that is 1e-6 as long as the optimiser is a smooth
function of the gradient. Adam with beta_1 = 0 and a tiny eps is not: its update is the
gradient's sign, which rounding can turn where the gradient is nearly zero (last test).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep.data.batches import Latents
from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch
from fewstep.methods.sid import SiD
from fewstep.nets.mlp import MLP
from fewstep.runs.averages import Averages
from fewstep.storage import checkpoint
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training import distributed
from fewstep.training.averaging import averaging
from fewstep.training.ema import EMA
from fewstep.training.loop import State, train
from fewstep.training.optim import Optim
from fewstep.training.power_ema import PowerEMA
from fewstep.training.sharding import shard
from tests.processes import results, together

METHOD, MODEL = SiD(alpha=1.0), Model(MLP(width=16, blocks=1), (2,), sigma_data=0.7)
SMOOTH = Optim(1e-2, (0.9, 0.99), eps=1e-3)
STEPS = 10


def everything(state: State) -> dict[str, Tensor]:
    """All tensors and counters of a run."""
    parts = checkpoint.tensors(state)
    found = {f"{part}.{name}": t for part in parts for name, t in parts[part].items()}
    counters = [float(getattr(state, name)) for name in checkpoint.COUNTERS]
    return {**found, "counters": torch.tensor(counters, dtype=torch.float64)}


def run(
    until: int = STEPS,
    accumulate: int = 1,
    optim: Optim = SMOOTH,
    source: Any = None,
    resume: Path | None = None,
    save: Path | None = None,
    parts: int | None = None,
    offload: bool = False,
) -> Any:
    """Train to `until`, nets in parts unless None; (everything, the logs of all steps)."""
    with distributed.process_group():
        teacher = GaussianMixture.ring(3)
        state = State.init(METHOD, teacher, MODEL.build(1))
        for net in (*state.nets.values(), state.average) if parts is not None else ():
            shard(net, parts or 0, offload)
        if resume:
            optims = {"student": optim, "fake": optim}
            checkpoint.resume_newest(resume, state, METHOD, optims)
        settings: Any = {"batch": 16, "optim": optim, "ema": EMA(100), "state": state}
        records = train(
            METHOD,
            teacher,
            MODEL.build(1),
            source or Latents((2,)),
            steps=until,
            accumulate=accumulate,
            **settings,
        )
        logs = [record.logs for record in records]
        checkpoint.require_equal_state(state)
        if save:
            with checkpoint.Writer(save, METHOD) as writer:
                writer.save(state)
        return {k: distributed.full_tensor(v).clone() for k, v in everything(state).items()}, logs


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between any two numbers."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def weights(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in found.items() if not k.startswith("optim")}


def test_two_processes_have_the_bits_of_one_that_accumulates(tmp_path: Path) -> None:
    one, logs = run(accumulate=2)
    for found, told in results(2, tmp_path, run):
        assert apart(found, one) == 0.0
        assert told == logs


@pytest.mark.parametrize(("size", "accumulate"), [(2, 2), (4, 1)])
def test_the_number_of_processes_does_not_matter(
    size: int, accumulate: int, tmp_path: Path
) -> None:
    one, logs = run()
    ranks = results(size, tmp_path, run, STEPS, accumulate)
    assert 0 < apart(ranks[0][0], one) < 1e-6
    assert all(apart(found, ranks[0][0]) == 0 and told == ranks[0][1] for found, told in ranks)
    for ours, theirs in zip(ranks[0][1], logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


class Noted:
    """A source that remembers whose samples it made."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, draws: Draws) -> Batch:
        self.numbers += draws.index.tolist()
        return Latents((2,))(draws)


def samples(until: int, accumulate: int) -> Counter[int]:
    source = Noted()
    run(until, accumulate, source=source)
    return Counter(source.numbers)


@pytest.mark.parametrize(("size", "accumulate"), [(1, 4), (2, 1), (4, 2)])
def test_all_samples_are_used_once(size: int, accumulate: int, tmp_path: Path) -> None:
    """Two turns a step of 16 samples each, whoever computes them; ranks share none."""
    ranks = results(size, tmp_path, samples, 3, accumulate)
    assert sum(ranks, Counter()) == Counter(range(3 * 2 * 16))
    assert all(len(found) == 96 // size for found in ranks)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    for end in together(2, tmp_path, run, STEPS, 16):
        sentence = "batch 16 must be a positive multiple of accumulate 16 x 2 processes"
        assert end.code == 99
        assert end.err.splitlines()[-1] == f"ValueError: {sentence}"


@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 2), (2, 1)])
def test_runs_continue_with_any_number_of_processes(
    before: int, after: int, tmp_path: Path
) -> None:
    """Saved at step 4 of 10; with the same number of processes to the bit."""
    undisturbed, logs = results(after, tmp_path, run)[0]
    results(before, tmp_path, run, 4, 1, SMOOTH, None, None, tmp_path / "c")
    again, told = results(after, tmp_path, run, STEPS, 1, SMOOTH, None, tmp_path / "c")[0]
    distance = apart(again, undisturbed)
    assert len(told) == 6
    assert distance == 0 if before == after else 0 < distance < 1e-6
    if before == after:
        assert told == logs[4:]


def counted() -> list[int]:
    """How many numbers each message of one step carries."""
    sizes = []
    send = dist.all_reduce

    def noting(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return send(tensor, *args, **options)

    dist.all_reduce = noting
    compare, checkpoint.require_equal_state = checkpoint.require_equal_state, lambda state: None
    try:
        run(1)
    finally:
        dist.all_reduce, checkpoint.require_equal_state = send, compare
    return sizes


def test_frozen_networks_do_not_communicate(tmp_path: Path) -> None:
    """A turn sends which gradients exist, those of the trained net alone, and one loss."""
    net = MODEL.build()
    tensors, numbers = len(list(net.parameters())), sum(p.numel() for p in net.parameters())
    assert results(2, tmp_path, counted) == [[tensors, numbers, 1] * 2] * 2


def lopsided() -> Sequence[Any]:
    """Rank 0 has no gradient of `a`, no rank has one of `b`; types and buckets are mixed."""
    with distributed.process_group():
        net = nn.ParameterDict({k: nn.Parameter(torch.ones(3)) for k in "abc"})
        net["d"] = nn.Parameter(torch.ones(2, dtype=torch.float64))
        rank = distributed.rank()
        distributed.BUCKET = 2
        if rank == 1:
            net["a"].grad = torch.full((3,), 5.0)
        net["c"].grad = torch.tensor([1.0, 2.0, 3.0]) * (1 + rank)
        net["d"].grad = torch.tensor([1.0, 1 / 3], dtype=torch.float64)
        with averaging(net, None):
            pass
        return [None if p.grad is None else p.grad.tolist() for p in net.values()]


def test_gradients_are_averaged_by_value(tmp_path: Path) -> None:
    expected = [[2.5] * 3, None, [1.5, 3.0, 4.5], [1.0, 1 / 3]]
    assert results(2, tmp_path, lopsided) == [expected] * 2


def test_signs_of_tiny_gradients_are_no_smooth_function(tmp_path: Path) -> None:
    """Why the tests above use beta_1 = 0.9, eps = 1e-3: the published ones amplify rounding.

    A hundredfold within two dozen steps.
    """
    published, steps = Optim(1e-2, (0.0, 0.999)), 24
    one, _ = run(steps, optim=published)
    two, _ = results(2, tmp_path, run, steps, 1, published)[0]
    assert 1e-6 < apart(weights(two), weights(one)) < 0.1


def averaged(folder: Path) -> tuple[int, bool, str]:
    """Networks this rank averages, whether they follow, and how it hears of a lost file."""
    with distributed.process_group():
        state = State.init(METHOD, GaussianMixture.ring(3), MODEL.build(1))
        kept = Averages(PowerEMA((0.1,)), folder, state, "student")
        state.step, state.images = 1, 16
        for p in state.nets["student"].parameters():
            p.data += 1
        kept.update(state)
        kept.save(state, regular=True)
        distributed.mean_over_ranks(torch.zeros(1))  # rank 0 has stored them
        again = Averages(PowerEMA((0.1,)), folder, state, "student")
        sums = [[float(p.detach().sum()) for p in n.parameters()] for n in again.nets.values()]
        follows = sums == [[float(p.sum()) for p in state.nets["student"].parameters()]]
        try:
            state.step = 2
            Averages(PowerEMA((0.1,)), folder, state, "student")
        except ValueError as error:
            return len(again.nets), follows, str(error)
    return 0, False, ""


def test_rank_0_alone_keeps_power_averages(tmp_path: Path) -> None:
    """After a first update they are the net; what rank 0 does not find is missing for all."""
    missing = f"{tmp_path / 'step-00000002' / 'manifest.json'} is missing"
    expected = [(1, True, missing), (0, False, missing)]
    assert results(2, tmp_path, averaged, tmp_path) == expected
