"""A rehearsal: one step of a run, by its own loop, on tensors without numbers.

The networks, the turns of the method, optimisers, averages, adapters, recomputation and autocast
are those of the run itself, because `fewstep.runs.runner.prepare` makes them and
`fewstep.training.loop.train` moves them; only weights and samples are missing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Heun
from fewstep.diffusion.types import Batch, Cond, Source, device_of
from fewstep.domains.domain import Domain
from fewstep.plan.gathers import Message, Watch
from fewstep.plan.meta_memory import AsOnDevice, MetaMemory
from fewstep.runs.run import Run
from fewstep.runs.runner import PreparedRun, prepare
from fewstep.storage import checkpoint
from fewstep.teachers.diffusers.adapter_base import Adapter, adapter_of
from fewstep.training.loop import State


@dataclass(frozen=True)
class StepCost:
    """Memory and computation of one process, which computes its batch at once."""

    peak: int
    """Bytes, at the worst moment of the steps."""
    kept: int
    """Bytes between two steps: weights, moments, averages."""
    gradient: int
    """Bytes of the gradient of the largest net that is trained."""
    block: int
    """Bytes of the largest entry of a list of blocks, which is put together of its parts."""
    operations: float
    """Floating-point operations of a step's matrix products and convolutions."""
    start: int = 0
    """Bytes before the first step, when every net has been made and none is cut into parts."""
    messages: tuple[tuple[Message, int], ...] = ()
    """What is sent in a step, and how often."""
    nets: tuple[NetCost, ...] = ()
    checkpoint: int = 0
    """Bytes of a checkpoint's tensors."""
    sample: int = 0
    """Bytes that are read for a sample: its condition, and a picture where there is one."""


@dataclass(frozen=True)
class NetCost:
    """A network of a run."""

    name: str
    """As the method calls it; "teacher" and "average"."""
    numbers: int
    bytes: int
    """Of its parameters."""
    trained: bool


def measure_step(
    run: Run, gpu: bool = False, teacher: Model | None = None, parts: bool = False
) -> StepCost:
    """The cost of a training step of `run`, found without weights or data of its teacher.

    Arguments:
        run: its model must be known.
        teacher: its teacher's network, where that is another.
        gpu: count as on an accelerator, where autocast keeps normalisations in float32.
        parts: do the step as it is done with nets in parts, though they are whole here.
    Raises ValueError as `prepare` does, and where nets cannot be in parts.
    """
    lower = None if run.precision == "fp32" else torch.bfloat16
    ledger = MetaMemory()
    with ledger, AsOnDevice(lower, wide=gpu):
        work = prepared(run, "meta", teacher).rehearsal()
        state = work.init()
        start, nets = ledger.peak, _nets(work, state)
        watch = Watch(_cut(work, state) if parts else {})
        _prime(state, run)
        for name, optimizer in state.optimizers.items():
            watch.averages(name, optimizer)
        turns = run.method.turns(state.step)
        for record in work.records(state):
            watch.logs(turns, record.logs)
        kept, peak, trained = ledger.live, ledger.peak, [state.nets[n] for n in state.optimizers]
        operations = float(ledger.operations)
        stored = _bytes(checkpoint.tensors(state))
        sample = _sample(work)
    gradient, block = (max(map(of, trained), default=0) for of in (size, _block))
    sent = tuple(watch.sent.items())
    return StepCost(peak, kept, gradient, block, operations, start, sent, nets, stored, sample)


def prepared(run: Run, device: str = "cpu", teacher: Model | None = None) -> PreparedRun:
    """The prepared run, with teacher and data that are only described."""
    return prepare(replace(run, domain=Unseen(teacher or run.model, device)), "plan", "", device)


def rehearsed(work: PreparedRun) -> State:
    """Do the last step of a run, when all of it has begun; the state after it.

    Optimisers have their moments before.
    """
    work = work.rehearsal()
    state = begun(work)
    for _ in work.records(state):
        pass
    return state


def begun(work: PreparedRun) -> State:
    """The state of a run before its last step."""
    state = work.init()
    _prime(state, work.run)
    return state


def _prime(state: State, run: Run) -> None:
    """Bring the state to the last step, with optimisers that have been stepped once."""
    state.step = run.steps - 1
    names = list(dict.fromkeys(turn.net for turn in run.method.turns(state.step)))
    for name in names:
        net = state.nets[name]
        if not any(True for _ in net.parameters()):  # it is measured, not updated
            continue
        optimizer = run.optims(state.nets)[name].build(net.requires_grad_(True).parameters())
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        net.requires_grad_(False)
        state.optimizers[name] = optimizer


def _cut(work: PreparedRun, state: State) -> dict[str, nn.Module]:
    """The nets that `PreparedRun.init` cuts into parts, by name."""
    nets = {**state.nets, "average": state.average}
    teacher = work.denoiser
    if isinstance(teacher, nn.Module) and work.run.lora is None:
        nets["teacher"] = teacher
    return {name: net for name, net in nets.items() if any(True for _ in net.parameters())}


def _nets(work: PreparedRun, state: State) -> tuple[NetCost, ...]:
    """All networks of a run."""
    trained = {turn.net for turn in work.run.method.turns(work.run.steps - 1)}
    nets: dict[str, object] = {"teacher": work.denoiser, **state.nets, "average": state.average}
    return tuple(
        NetCost(name, sum(p.numel() for p in net.parameters()), size(net), name in trained)
        for name, net in nets.items()
        if isinstance(net, nn.Module)
    )


def _sample(work: PreparedRun) -> int:
    """Bytes that are read for a sample: conditions of prompts are stored in half precision."""
    batch = work.source(Draws.range(0, 1, work.run.seed, device_of(work.net)))
    conditions = _bytes(batch.cond)
    return (conditions if work.run.model.classes else conditions // 2) + _bytes(batch.x0)


def _bytes(tensors: Any) -> int:
    """Bytes of all tensors in it."""
    return sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))


def size(net: nn.Module) -> int:
    """Bytes of the parameters of `net`."""
    return sum(p.numel() * p.element_size() for p in net.parameters())


def _block(net: nn.Module) -> int:
    lists = [m for m in net.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict))]
    return max((size(block) for one in lists for block in one.children()), default=size(net))


@dataclass(frozen=True)
class Unseen(Domain):
    """A domain whose teacher is known by its model alone, and data by that of the student."""

    model: Model
    device: str

    def exact(self) -> Generator:
        """The teacher, with weights that mean nothing."""
        with torch.device(self.device):
            net: Any = self.model.build()
        net.requires_grad_(False).eval()
        return Generator(net, Heun(), self.model.shape, self.model.classes, self.model)

    def source(self, model: Model, data_free: bool) -> Source:
        """Batches of noise, with zeros for pictures."""
        return Nothing(model, data_free)

    def source_for(self, teacher: Generator | None, model: Model, data_free: bool) -> Source:
        """Batches with the conditions that the teacher takes."""
        net = None if teacher is None else adapter_of(teacher.denoiser)
        return Nothing(model, data_free, net)


@dataclass(frozen=True)
class Nothing:
    """Batches of noise; pictures and prompts are all zero."""

    model: Model
    data_free: bool
    spoken: Adapter | None = None

    def __call__(self, draws: Draws) -> Batch:
        z = draws.normal("z", self.model.shape)
        x0 = None if self.data_free else torch.zeros_like(z)
        return Batch(z, self._cond(draws), x0, draws)

    def _cond(self, draws: Draws) -> Cond:
        if self.model.classes:
            return draws.integers("label", self.model.classes)
        if self.spoken is None:
            return None
        null, count = self.spoken.null(), len(draws.index)
        return {name: b.half().repeat(count, *(1,) * b.ndim).float() for name, b in null.items()}
