"""Compiled calls: same numbers, same names, and nothing compiled after the first turns.

The slow tests run torch's compiler without its code generator (backends "eager" and "aot_eager"),
which captures and guards as ever; the fast ones put another function in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batches import Latents
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.samplers import FewStep
from fewstep.distillation.method import Method
from fewstep.domains.pictures import Pictures
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.scm import SCM
from fewstep.methods.sid import SiD
from fewstep.nets.experts import ExpertsNet
from fewstep.nets.lora import LoRA, Shared
from fewstep.nets.mlp import MLP
from fewstep.nets.routed import Routed
from fewstep.plan.meta_memory import MetaMemory
from fewstep.runs.run import Run
from fewstep.runs.runner import PreparedRun, Step, execute
from fewstep.training import compiled
from fewstep.training.compiled import CompiledCall, compile_calls
from fewstep.training.loop import State, train
from fewstep.training.optim import Optim
from tests.command import bits, fewstep, tree
from tests.methods.test_battery import network, source
from tests.networks import NETS, samples, shape_of, stirred

MODEL = Model(MLP(16, 1), (2,))
PICTURES = Model(MLP(16, 1), (1, 4, 4), 3, VE())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls by "compiled" code, which here is the function itself; none is compiled."""
    calls: list[str] = []

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        assert options == {"dynamic": False, "backend": "inductor"}

        def fast(*args: Any, **named: Any) -> Any:
            calls.append(type(args[0]).__name__)
            return function(*args, **named)

        return fast

    monkeypatch.setattr(torch, "compile", compile)
    return calls


def test_a_net_stays_what_it_was(counted: list[str]) -> None:
    net = stirred(MODEL.build())
    before, x, t = deepcopy(net), torch.randn(3, 2), torch.tensor([0.1, 1.0, 9.0])
    compile_calls(net)
    names = list(net.state_dict()), [name for name, _ in net.named_modules()]
    assert names == (list(before.state_dict()), [name for name, _ in before.named_modules()])
    assert torch.equal(net(x, t), before(x, t))
    assert counted == ["EDM"]
    copy = deepcopy(net)
    next(copy.parameters()).data.zero_()
    assert not torch.equal(copy(x, t), net(x, t))  # the copy calls itself
    assert torch.equal(net(x, t), before(x, t))
    assert counted == ["EDM"] * 3
    assert not isinstance(vars(copy)["forward"], CompiledCall)


def test_what_a_compiler_would_miss_is_called_as_ever(counted: list[str]) -> None:
    net: Any = stirred(MODEL.build())
    x, t = torch.randn(3, 2), torch.tensor([0.1, 1.0, 9.0])
    compile_calls(net)
    torch.func.vmap(net)(x[:, None], t[:, None])
    with MetaMemory():
        net(x, t)
    assert counted == []
    heard: list[Tensor] = []
    handle = net.net.blocks[0].register_forward_hook(lambda *all: heard.append(all[2]))
    net(x, t)
    assert (len(heard), counted) == (1, [])
    handle.remove()
    net(x, t)
    assert (len(heard), counted) == (1, ["EDM"])


def test_hooks_of_the_whole_net_and_its_other_methods_are_as_ever(counted: list[str]) -> None:
    """Such a hook fetches a teacher that rests in main memory (`fewstep.training.offload`)."""
    net: Any = NETS["ddpm++"]()
    order: list[int] = []
    net.register_forward_pre_hook(lambda *_: order.append(len(counted)))
    compile_calls(net)
    xt, t, labels, _ = samples(net)
    with torch.no_grad():
        net(xt, t, labels)
        assert (order, counted) == ([0], ["EDMPrecond"])
        net.encode(xt, t, labels)
    assert counted == ["EDMPrecond"]


def test_each_net_has_code_of_its_own() -> None:
    """torch keeps eight ways with each piece of code, and networks of a class share theirs."""
    bound = torch.tensor(3.0)

    def forward(self: nn.Module, x: Tensor, *, times: float = 2.0) -> Tensor:
        return times * x + bound

    first, second = compiled._own(forward), compiled._own(forward)
    assert len({id(f.__code__) for f in (first, second, forward)}) == 3
    assert first(None, torch.tensor(5.0)) == 13.0
    assert second(None, torch.tensor(5.0), times=1.0) == 8.0


def test_adapters_share_their_base_through_a_compiled_role(counted: list[str]) -> None:
    base: Any = stirred(MODEL.build())
    role: Any = LoRA(2, targets=("*",)).adapt(base)
    average = deepcopy(role)
    compile_calls(role)
    weight = role.net.first.base.weight
    assert type(weight) is Tensor
    assert weight.data_ptr() == base.net.first.weight.data_ptr()
    again = deepcopy(role).net.first.base.weight
    assert isinstance(again, Shared)
    assert again.data_ptr() == weight.data_ptr()
    assert list(role.state_dict()) == list(average.state_dict())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (replace(MODEL, inputs=("s",)).build, "further inputs"),
        (replace(MODEL, heads=2).build, "several heads"),
        (replace(MODEL, classes=2, net=Routed(MODEL.net)).build, "students for different labels"),
        (
            lambda: ExpertsNet((MODEL.build(), MODEL.build()), (1.0,)),
            "experts for different times",
        ),
    ],
    ids=["inputs", "heads", "routed", "experts"],
)
def test_nets_that_change_with_each_call_are_refused(
    make: Callable[[], nn.Module], why: str
) -> None:
    with pytest.raises(ValueError, match=f"a network with {why} does not.*leave out --compile"):
        compile_calls(make())


def test_runs_that_cannot_be_compiled_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(SiD(), MODEL, Pictures("none.npz"), 5, compile=True)
    with pytest.raises(ValueError, match="leave out --compile, or give --no-recompute"):
        replace(run, recompute=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="leave out --shard, or --compile"):
        PreparedRun(run, None, MODEL.build(), Latents((2,)), parts=2)


def test_a_machine_without_a_compiler_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Missing(RuntimeError):
        """As torch's compiler raises it."""

    Missing.__module__ = "torch._inductor.exc"

    def compile(*_: Any, **__: Any) -> Callable[..., Any]:
        def fast(*_: Any) -> None:
            raise Missing("No working C++ compiler\nfound in ...")

        return fast

    monkeypatch.setattr(torch, "compile", compile)
    net = MODEL.build()
    compile_calls(net)
    sentence = "torch cannot compile EDM here, leave --compile out: No working C\\+\\+ compiler$"
    with pytest.raises(ValueError, match=sentence):
        net(torch.zeros(1, 2), torch.ones(1))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The number of graphs compiled since the last call; nothing is left for other tests."""
    from torch._dynamo.utils import counters

    def graphs() -> int:
        count = int(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
        counters.clear()
        return count

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    return graphs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "graphs"),
    [
        (SiD(), 5),  # teacher; fake score as learner and judge; student as learner and sampler
        (SiD(FewStep(2.5, 4)), 6),  # and a student whose earlier calls have no graph
        (DMD2(ratio=2), 4),  # the fake score learns through another method of its network
        (SCM(), 2),  # teacher and student; the student's derivative is taken without a compiler
    ],
    ids=["sid", "four calls", "dmd2", "scm"],
)
def test_turns_compile_once(method: Method, graphs: int, fresh: Callable[[], int]) -> None:
    """All of it in the first two steps, whatever their turns; numbers are as without."""
    ends, found = [], []
    for fast in (False, True):
        teacher = network(0).double()
        state = State.init(method, teacher, network(1).double())
        for net in (*state.nets.values(), teacher) if fast else ():
            if hasattr(net, "path"):
                compile_calls(net)
        data = partial(source, data=method.needs_data)
        for _ in train(method, teacher, teacher, data, batch=4, steps=5, state=state):
            found.append(fresh())
        ends.append(torch.cat([p.flatten() for p in state.nets.parameters()]))
    assert found[:5] == [0] * 5
    assert found[7:] == [0] * 3
    assert sum(found) == graphs
    assert torch.allclose(*ends, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "patches", "edm2", "headed", "adapted"])
def test_each_kind_of_network_is_one_graph(name: str, fresh: Callable[[], int]) -> None:
    """Trained and frozen, each called twice: answers and gradients are those without it."""
    ends = []
    for fast in (False, True):
        net = stirred(NETS[name]()).eval()
        if fast:
            compile_calls(net)
        found = []
        for trained in (False, True, False, True):
            for p in net.train(trained).parameters():
                p.requires_grad_(trained)
            xt, t, labels, _ = samples(net, shape_of(name), 2)
            xt.requires_grad_()
            torch.manual_seed(0)
            out = net(xt, t, labels)
            out.square().sum().backward()
            found += [out.detach(), xt.grad, *(p.grad for p in net.parameters())]
        ends.append([f for f in found if f is not None])
        assert fresh() == (2 if fast else 0)
    assert len(ends[0]) == len(ends[1]) > 8
    for ours, theirs in zip(*ends, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def finish(run: Run, out: Path, teacher: Path | None, stop: int = 0) -> None:
    given = "" if teacher is None else str(teacher)
    with closing(execute(run, out, recipe="test", teacher=given)) as work:
        for progress in work:
            if stop and isinstance(progress, Step) and progress.step == stop:
                break


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"offload": True},
        {"lora": LoRA(2, targets=("*",)), "precision": "bf16", "frozen": "bf16"},
    ],
    ids=["whole, offload", "adapters"],
)
def test_a_run_has_the_same_files(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a run without a compiler, names and bits; and so has one stopped and continued."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (24, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=pictures, labels=np.arange(24) % 3)
    settings: dict[str, Any] = {"steps": 4, "batch": 4, "optim": Optim(1e-2), "save_every": 2}
    data = Pictures(str(tmp_path / "set.npz"))
    finish(Run(Pretrain(), PICTURES, data, **settings), tmp_path / "teacher", None)
    run = Run(SiD(), PICTURES, data, **settings, **changes)
    teacher = tmp_path / "teacher"
    finish(run, tmp_path / "plain", teacher)
    calls = []
    monkeypatch.setattr(
        CompiledCall,
        "__call__",
        lambda self, *args, __call__=CompiledCall.__call__, **named: (
            calls.append(1),
            __call__(self, *args, **named),
        )[1],
    )
    finish(replace(run, compile=True), tmp_path / "whole", teacher)
    assert len(calls) >= 4 * 5
    finish(replace(run, compile=True), tmp_path / "parts", teacher, stop=3)
    finish(replace(run, compile=True), tmp_path / "parts", teacher)
    whole, parts, plain = (tmp_path / name for name in ("whole", "parts", "plain"))
    assert set(tree(whole)) == set(tree(plain))
    for folder in ("student", "checkpoints/step-00000004"):
        assert bits(whole / folder) == bits(parts / folder) == bits(plain / folder)


def test_the_flag_says_what_it_does() -> None:
    done = fewstep("distill", "digits", "--help")
    assert "--compile" in done.out
    assert "torch.compile" in done.out
    both = ("--compile", "--recompute", "--teacher", "none", "--out", "new")
    done = fewstep("distill", "digits", *both)
    assert done.code == 2
    assert done.err.endswith("leave out --compile, or give --no-recompute\n")
