"""Adapters on several processes: the same bits, whether their parts are sharded or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.batches import Latents
from fewstep.nets.lora import LoRA
from fewstep.runs.monitor import Monitor
from fewstep.storage import checkpoint
from fewstep.training import distributed
from fewstep.training.ema import EMA
from fewstep.training.loop import State, train
from fewstep.training.sharding import shard
from tests.command import DISTIL, fewstep
from tests.processes import results
from tests.training.test_distributed import METHOD, MODEL, SMOOTH, apart, everything
from tests.training.test_distributed_faults import look

pytestmark = pytest.mark.slow

ADAPT = LoRA(3, targets=("*",))


def run(accumulate: int = 1, sharded: bool = False) -> dict[str, Tensor]:
    """Everything after six steps of two adapters on a teacher of random weights."""
    with distributed.process_group():
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
        checkpoint.require_equal_state(state)
        assert torch.equal(teacher.net.first.weight, before)
        parts = [distributed.local_tensor(p) is not p for p in state.nets.parameters()]
        assert all(parts) if sharded else not any(parts)
        return {k: distributed.full_tensor(v).clone() for k, v in everything(state).items()}


def test_two_processes_have_the_bits_of_one(tmp_path: Path) -> None:
    """Of one that accumulates in two parts; sharded ones too."""
    one = run(accumulate=2)
    assert max(float(t.norm()) for name, t in one.items() if name.endswith("up")) > 1e-3
    for found in (*results(2, tmp_path, run), *results(2, tmp_path, run, 1, True)):
        assert apart(found, one) == 0.0


def command(teacher: Path, out: Path, *more: str) -> int:
    """Distil digits on every rank."""
    Monitor.look = look  # type: ignore[method-assign]
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
