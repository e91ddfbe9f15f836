"""What a rehearsal on one process foretells, against what several processes do in the same steps.

Equal to the byte: the collectives of a step as torch's dispatcher sees them, the bytes that each
process keeps of nets in parts, the files of a checkpoint; and the operations of torch's own
counter. Negative controls: terms left out of the prediction, each of which has to be noticed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # seconds, saved in every forked process
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fewstep.data.embeddings import Embeddings
from fewstep.diffusion.samplers import FewStep
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.sid import SiD
from fewstep.nets.edm2 import Precond
from fewstep.plan.gathers import Message, Size, Watch, _Unit
from fewstep.plan.meta_memory import FLASH, FLASH_BACKWARD
from fewstep.plan.meta_step import StepCost, measure_step, prepared
from fewstep.plan.traffic import exchanges
from fewstep.recipes.digits import digits
from fewstep.recipes.text_to_image import t2i_flow
from fewstep.runs.run import Run
from fewstep.runs.teacher import describe_model
from fewstep.storage import checkpoint
from fewstep.teachers.diffusers.adapter_base import adapter_of
from fewstep.training import distributed
from tests.conftest import Folders, folders
from tests.processes import results

__all__ = ["folders"]

KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}
Sent = Counter[tuple[str, float, int]]
"""Kind, bytes of the whole and number of members -> how often."""


class Recorder(TorchDispatchMode):
    """The collectives that torch's dispatcher sees, those within operations on DTensors too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: Sent = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name = func._opname
        if func.namespace == "_c10d_functional" and name == "all_reduce":
            self.sent["all-reduce", args[0].nbytes, group_size(args[2])] += 1
        elif func.namespace == "c10d":
            sizes = [t.nbytes for t in tree_leaves(args[:2]) if isinstance(t, torch.Tensor)]
            groups = [a for a in args if isinstance(a, torch.ScriptObject)]
            members = next(n for n in map(group_of, groups) if n)
            self.sent[KINDS[name], max(sizes), members] += 1
        return func(*args, **(kwargs or {}))


def group_size(name: str) -> int:
    size: int = torch._C._distributed_c10d._resolve_process_group(name).size()
    return size


def group_of(script: Any) -> int:
    try:
        return dist.ProcessGroup.unbox(script).size()
    except RuntimeError:  # it is the operation of a reduction
        return 0


ATTENTION = {
    FLASH: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    FLASH_BACKWARD: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
}
"""Of a CPU, which torch's counter does not know."""


class Recorded(NamedTuple):
    """What a step of one process was."""

    sent: Sent
    operations: int
    cut: int
    """Bytes that it keeps of what is in parts."""
    whole: int
    """And of what is not: buffers, and counts of updates."""
    saved: int
    """Bytes of a checkpoint's tensors."""


def recorded(run: Run, parts: int, home: Path) -> Recorded:
    """One step, and a checkpoint after it."""
    work = replace(prepared(run), parts=parts).rehearsal()
    state = work.init()
    state.step = run.steps - 1
    recorder, counter = Recorder(), FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with recorder, counter:
        for _ in work.records(state):
            pass
    with checkpoint.Writer(home, run.method) as writer:
        writer.save(state)
        writer.finish()
    every = [t for part in checkpoint.tensors(state).values() for t in part.values()]
    teacher = work.denoiser
    assert isinstance(teacher, torch.nn.Module)
    every += [*teacher.parameters(), *teacher.buffers()]
    cut = sum(t.to_local().nbytes for t in every if isinstance(t, DTensor))
    whole = sum(t.nbytes for t in every if not isinstance(t, DTensor))
    return Recorded(recorder.sent, counter.get_total_flops(), cut, whole, stored(home))


def stored(home: Path) -> int:
    """Bytes of the tensors in a checkpoint's files, without their headers."""
    found = 0
    for file in home.glob("*/*.safetensors"):
        header = int.from_bytes(file.read_bytes()[:8], "little")
        found += file.stat().st_size - 8 - header
    return found


def every(cases: list[tuple[Run, int]], home: Path) -> list[Any]:
    with distributed.process_group():
        return [recorded(*case, home / str(number)) for number, case in enumerate(cases)]


def foretold(cost: StepCost, count: int, parts: int, microbatches: int) -> Sent:
    """What the plan says of `count` processes."""
    found: Sent = Counter()
    for one in exchanges(cost.messages, count, parts, microbatches):
        found[one.kind, one.bytes, one.members] += one.times
    return found


def of_one(run: Run, count: int, parts: int) -> StepCost:
    """The cost of a process, which computes a microbatch at once."""
    small = replace(run, batch=run.batch // run.accumulate // count, accumulate=1)
    return measure_step(small, parts=parts > 1)


def check(run: Run, count: int, parts: int, found: Recorded) -> None:
    """All that was recorded is what was foretold; the last parts of nets are filled up."""
    cost = of_one(run, count, parts)
    assert foretold(cost, count, parts, run.accumulate) == found.sent
    assert found.operations == cost.operations * run.accumulate
    share = (cost.kept - found.whole) / parts
    assert share <= found.cut < 1.05 * share or share == found.cut == 0
    assert cost.checkpoint == found.saved


def gan(**more: Any) -> Run:
    """Six turns, a learned head on the fake score, and data."""
    return replace(digits(), method=DMD2(FewStep(2.5)), **more)


def tiny(folders: Folders, kind: str, recipe: Callable[[], Run], **more: Any) -> Run:
    return replace(recipe(), model=describe_model(folders(kind)), **more)


@pytest.mark.slow
def test_two_processes_send_what_was_foretold(folders: Folders, tmp_path: Path) -> None:
    """Whole nets; and nets in two parts, computed again.

    Negative control: without the teacher.
    """
    flux = tiny(folders, "flux", t2i_flow, batch=2, accumulate=1, recompute=True)
    cases = [(gan(batch=4), 1), (flux, 2)]
    found = results(2, tmp_path, every, cases, tmp_path)[0]
    for (run, parts), one in zip(cases, found, strict=True):
        check(run, 2, parts, one)
    sent, cost = found[1].sent, of_one(flux, 2, 2)
    without = tuple(one for one in cost.messages if one[0].net != "teacher")
    assert foretold(replace(cost, messages=without), 2, 2, 1) != sent


@pytest.mark.slow
def test_copies_in_parts_send_what_was_foretold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two copies in two parts (HSDP), whose rows are filled up; twice a step, as accumulated.

    Negative controls: once a step; other parts; nothing filled up; nothing for the gradient.
    """
    run = replace(digits(), batch=8, accumulate=2)
    (found,) = results(4, tmp_path, every, [(run, 2)], tmp_path)[0]
    check(run, 4, 2, found)
    cost = of_one(run, 4, 2)
    assert foretold(cost, 4, 2, 1) != found.sent
    assert foretold(cost, 4, 4, 2) != found.sent
    sent = sum(b * n for (kind, b, _), n in found.sent.items() if kind == "all-gather")
    assert sent > 2 * sum(m.bytes() * n for m, n in cost.messages if m.kind == "gather")
    monkeypatch.setattr(_Unit, "_grad", lambda self, _: None)
    assert foretold(of_one(run, 4, 2), 4, 2, 2) != found.sent


def test_one_process_sends_nothing(tmp_path: Path) -> None:
    """And computes, keeps and saves what was foretold; of another batch it would be more."""
    run = replace(digits(), batch=4)
    found = recorded(run, 1, tmp_path)
    assert found.sent == Counter()
    cost = measure_step(run)
    assert (found.operations, found.cut, found.whole) == (cost.operations, 0, cost.kept)
    assert found.saved == cost.checkpoint
    assert measure_step(replace(run, batch=5)).operations != found.operations


def test_sizes_by_hand() -> None:
    """Five rows of three float32 in four parts are eight rows; a number alone is a row."""
    size = Size.of(torch.zeros(5, 3))
    assert (size, size.bytes(), size.bytes(4)) == (Size(5, 3, 4), 60, 96)
    assert Size.of(torch.tensor(1.0)) == Size(1, 1, 4)
    assert Message("gather", "student", (size, Size(2, 1, 2))).bytes(2) == 72 + 4


def counts(net: torch.nn.Module, call: Callable[[torch.nn.Module], Any]) -> dict[str, int]:
    """How often the units of a net are gathered and share a gradient, all units together."""
    watch = Watch({"net": net})
    call(net)
    found: Counter[str] = Counter()
    for message, times in watch.sent.items():
        found[message.kind] += times
    return dict(found)


def test_calls_by_hand() -> None:
    """Two blocks and a rest without weights: no gradient, one of the weights, one of the input."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    x = torch.ones(1, 2, requires_grad=True)
    with torch.no_grad():
        assert counts(Two(), lambda net: (net(x), net(x))) == {"gather": 4}
    assert counts(Two(), lambda net: net(x).sum().backward()) == {"gather": 4, "scatter": 2}
    frozen = Two().requires_grad_(False)
    assert counts(frozen, lambda net: net(x).sum().backward()) == {"gather": 4}


def test_what_parts_cannot_do_is_refused() -> None:
    net = Precond(8, 1, 0, model_channels=8, channel_mult=[1], num_blocks=1)
    with pytest.raises(ValueError, match="rewrites its weights in each step"):
        Watch({"student": net})


def test_a_sample_on_disk(folders: Folders, tmp_path: Path) -> None:
    """A row of the conditions of prompts takes what was foretold."""
    run = tiny(folders, "sd3", t2i_flow, batch=1, accumulate=1)
    teacher = prepared(run).denoiser
    adapter = adapter_of(teacher)
    assert adapter is not None
    null = {name: b.unsqueeze(0).float() for name, b in adapter.null().items()}
    assert [*Embeddings(tmp_path).fill(["a"], lambda prompts: null)] == [1]
    (file,) = tmp_path.glob("*.safetensors")
    data = file.read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert json.loads(data[8 : 8 + header])
    assert len(data) - 8 - header == measure_step(run).sample


def test_the_nets_of_a_method() -> None:
    """Teacher, student, fake score with its head, average; two of them trained."""
    cost = measure_step(gan(batch=2))
    net = digits().model.build()
    numbers = sum(p.numel() for p in net.parameters())
    assert [(n.name, n.trained) for n in cost.nets] == [
        ("teacher", False),
        ("student", True),
        ("fake", True),
        ("average", False),
    ]
    assert [n.numbers == numbers for n in cost.nets] == [True, True, False, True]
    assert cost.nets[2].numbers > numbers
    sid = measure_step(replace(digits(), method=SiD(), batch=2))
    assert [n.numbers for n in sid.nets] == [numbers] * 4
