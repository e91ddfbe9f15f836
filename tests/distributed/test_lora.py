"""Adapters on several processes: the same bits, whether their parts are sharded or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import checkpoint, parallel
from fewstep.data.source import Latents
from fewstep.ema import EMA
from fewstep.lora import LoRA
from fewstep.sharding import shard
from fewstep.training import State, train
from fewstep.watch import Watch
from tests.distributed.processes import results
from tests.distributed.test_faults import look
from tests.distributed.test_training import METHOD, MODEL, SMOOTH, apart, everything
from tests.end_to_end.command import DISTIL, fewstep

ADAPT = LoRA(3, targets=("*",))


def run(accumulate: int = 1, sharded: bool = False) -> dict[str, Tensor]:
    """Everything after six steps of two adapters on a teacher of random weights."""
    with parallel.joined():
        teacher: Any = MODEL.build(1)
        generator = torch.Generator().manual_seed(0)
        for p in teacher.parameters():
            p.data += 0.2 * torch.randn(p.shape, generator=generator)
        role = ADAPT.adapt(teacher)
        state = State.init(METHOD, teacher, role)
        for net in (*state.nets.values(), state.average) if sharded else ():
            shard(net)
        settings: Any = {"optim": SMOOTH, "ema": EMA(100), "state": state}
        before = teacher.net.first.weight.clone()
        data = Latents((2,))
        for _ in train(
            METHOD, teacher, role, data, batch=16, steps=6, accumulate=accumulate, **settings
        ):
            pass
        checkpoint.compare(state)
        assert torch.equal(teacher.net.first.weight, before)
        parts = [parallel.local(p) is not p for p in state.nets.parameters()]
        assert all(parts) if sharded else not any(parts)
        return {k: parallel.full(v).clone() for k, v in everything(state).items()}


def test_two_processes_have_the_bits_of_one(tmp_path: Path) -> None:
    """Of one that accumulates in two parts; sharded ones too."""
    one = run(accumulate=2)
    assert max(float(t.norm()) for name, t in one.items() if name.endswith("up")) > 1e-3
    for found in (*results(2, tmp_path, run), *results(2, tmp_path, run, 1, True)):
        assert apart(found, one) == 0.0


def command(teacher: Path, out: Path, *more: str) -> int:
    """Distil digits on every rank."""
    Watch.look = look  # type: ignore[method-assign]
    told = ("--lora", "LoRA(3, targets=('*',))", "--teacher", str(teacher), "--out", str(out))
    return fewstep(*DISTIL, *told, *more).code


def test_a_sharded_command(finished: Path, tmp_path: Path) -> None:
    """Its student, merged from parts, has the bits of a run of whole adapters."""
    teacher = finished / "runs" / "teacher"
    for name, flags in (("whole", ()), ("parts", ("--shard",))):
        assert results(2, tmp_path, command, teacher, tmp_path / name, *flags) == [0, 0]
    for file in ("model.safetensors", "lora.safetensors"):
        whole, parts = (tmp_path / name / "student" / file for name in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
