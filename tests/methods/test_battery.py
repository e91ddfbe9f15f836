"""What must hold for every method, path and sampler in `tests.instances`.

The teacher is a network with parameters, so that leaks of gradient show; all networks are small
MLPs with random weights everywhere, so that no difference of predictions is zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath, perturb, velocity_to_x0, x0_to_velocity
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch
from fewstep.distillation.discriminator_head import Heads
from fewstep.distillation.guidance_scales import Unguided
from fewstep.distillation.method import Method, Nets, Turn
from fewstep.distillation.pictures import give_decoder
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.sid import SiD
from fewstep.methods.sim import SIM
from fewstep.nets.mlp import MLP
from fewstep.training.loop import train
from fewstep.training.modes import training_only
from fewstep.training.optim import Optim
from tests import instances
from tests.instances import METHODS, PATHS, SAMPLERS, TIME_LAWS
from tests.parameters import once_a_class

F64 = torch.float64
CLASSES = 3
MODEL = Model(MLP(width=32, blocks=1), shape=(2,), classes=CLASSES)
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)
each_class = pytest.mark.parametrize("method", once_a_class(METHODS), ids=repr)


def stirred(net: nn.Module, seed: int) -> nn.Module:
    """`net`, moved far away."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.3 * noise.to(parameter.dtype)
    return net


def network(seed: int) -> nn.Module:
    """A denoiser that is far from its initial state."""
    return stirred(MODEL.build(seed), seed)


def in_a_row(x: Tensor) -> Tensor:
    """Pictures (B, 1, 1, D) of samples of D numbers, for methods that look at pictures."""
    return x.flatten(1)[:, None, None]


def scene(method: Method, dtype: torch.dtype = F64) -> tuple[Nets, Any]:
    """Nets that differ from one another and from the teacher."""
    teacher = network(0).to(dtype)
    give_decoder(teacher, in_a_row)
    nets = method.init(teacher, network(1).to(dtype))
    for number, net in enumerate(nets.values()):
        stirred(net, number + 2)
    return nets, teacher


def source(draws: Draws, dtype: torch.dtype = F64, data: bool = True, more: bool = True) -> Batch:
    """Noise, labels, data, and pairs that nothing made."""
    x0 = draws.normal("x0", (2,), F64).to(dtype) if data else None
    z, cond = draws.normal("z", (2,), F64).to(dtype), draws.integers("label", CLASSES)
    pair = {name: draws.normal(name, (2,), F64).to(dtype) for name in ("pair_z", "pair_x0")}
    return Batch(z, cond, x0, draws, {**pair, "pair_cond": cond} if more else {})


def gradients(nets: Nets, teacher: Any, turn: Turn, index: Tensor, parts: int = 1) -> Tensor:
    """What a turn leaves for its update, as one vector: its gradient over `index`, or its sums."""
    sums: dict[str, Tensor] = {}
    with training_only(nets, turn.net) as trained:
        for piece in index.chunk(parts):
            loss = turn.loss(nets, teacher, source(Draws(piece)))
            sums = {name: sums.get(name, 0) + value for name, value in loss.sums.items()}
            if loss.total is not None:
                (loss.total / parts).backward()
        found = [p.grad.flatten() for p in trained.parameters() if p.grad is not None]
        trained.zero_grad()
    return torch.cat([*found, *(value.double().flatten() for value in sums.values())])


def turns(method: Method) -> Iterator[Turn]:
    """The different turns of the first steps."""
    seen = set()
    for step in range(20):
        for turn in method.turns(step):
            key = turn.net, _identity(turn.loss)
            if key not in seen:
                seen.add(key)
                yield turn


def _identity(loss: Any) -> object:
    """What tells two losses apart: their code, and the step of a rollout they are bound to."""
    bound = getattr(loss, "args", ())
    function = getattr(loss, "func", loss)
    return getattr(function, "__func__", function).__code__, repr(bound)


@each_method
def test_only_the_turns_net_receives_gradient(method: Method) -> None:
    for turn in turns(method):
        nets, teacher = scene(method)
        teacher.requires_grad_(False)
        with training_only(nets, turn.net) as trained:
            loss = turn.loss(nets, teacher, source(Draws.range(0, 6)))
            if loss.total is None:
                assert not any(True for _ in trained.parameters())
                continue
            loss.total.backward()
        assert any(bool((p.grad != 0).any()) for p in trained.parameters() if p.grad is not None)
        others = [net for net in (*nets.values(), teacher) if net is not trained]
        assert all(p.grad is None for net in others for p in net.parameters())


@each_class
def test_training_moves_the_nets_and_never_the_teacher(method: Method) -> None:
    """Through the real loop, with a teacher that arrives trainable."""
    _, teacher = scene(method)
    before = [p.clone() for p in teacher.parameters()]
    start = network(1).double()
    data = partial(source, data=method.needs_data)
    records = train(
        method, teacher, start, data, batch=4, steps=3, optim=Optim(1e-2), accumulate=2
    )
    *_, last = records
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before, strict=True))
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is None for p in start.parameters())
    fresh = method.init(teacher, start)
    for name, net in last.state.nets.items():
        moved = zip(net.state_dict().values(), fresh[name].state_dict().values(), strict=True)
        assert any(not torch.equal(a, b) for a, b in moved) != (name in method.frozen)
    assert last.logs["skipped"] == 0


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_losses_and_gradients_are_finite(method: Method, dtype: torch.dtype) -> None:
    """64 samples, so that the tails of the time laws are visited."""
    nets, teacher = scene(method, dtype)
    for turn in turns(method):
        with training_only(nets, turn.net) as trained:
            loss, _, sums = turn.loss(nets, teacher, source(Draws.range(0, 64), dtype))
            assert all(bool(value.isfinite().all()) for value in sums.values())
            if loss is None:
                continue
            loss.backward()
            assert loss.isfinite()
            assert loss.shape == ()
            found = [p.grad for p in trained.parameters() if p.grad is not None]
            assert all(bool(g.isfinite().all()) for g in found)


@each_class
def test_losses_are_finite_at_the_very_start(method: Method) -> None:
    """Student, fake score and teacher equal: every difference of predictions is exactly zero."""
    teacher = network(0).double()
    give_decoder(teacher, in_a_row)
    nets = method.init(teacher, teacher)
    for turn in turns(method):
        assert gradients(nets, teacher, turn, torch.arange(8)).isfinite().all()


@each_method
def test_accumulation_is_one_batch(method: Method) -> None:
    """But for methods that couple the samples of a batch, where it must not be."""
    nets, teacher = scene(method)
    differs = False
    for turn in turns(method):
        whole = gradients(nets, teacher, turn, torch.arange(4))
        for parts in (2, 4):
            found = gradients(nets, teacher, turn, torch.arange(4), parts)
            same = torch.allclose(found, whole, rtol=1e-9, atol=1e-12)
            assert same or method.couples_samples
            differs = differs or not same
    assert differs == method.couples_samples


@each_class
def test_order_within_a_batch_does_not_matter(method: Method) -> None:
    nets, teacher = scene(method)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for turn in turns(method):
        whole = gradients(nets, teacher, turn, torch.arange(12))
        shuffled = gradients(nets, teacher, turn, order)
        torch.testing.assert_close(shuffled, whole, rtol=1e-9, atol=1e-12)
        others = gradients(nets, teacher, turn, order + 12)  # the check can fail
        assert (others - whole).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize(
    "thing",
    [
        *(*METHODS, *PATHS, *SAMPLERS, *TIME_LAWS),
        *(*instances.DISTANCES, *instances.WEIGHTS, *instances.GUIDANCE),
    ],
    ids=repr,
)
def test_repr_evaluates_to_an_equal_object(thing: object) -> None:
    again = eval(repr(thing), {**vars(instances), "inf": math.inf})
    assert again == thing
    assert hash(again) == hash(thing)
    assert repr(again) == repr(thing)


@each_class
def test_wrong_shapes_are_refused_by_name(method: Method) -> None:
    class Wrong(nn.Module):
        """A denoiser that forgets a dimension of its answer."""

        path = MODEL.path

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None, **named: Any) -> Tensor:
            return xt[:, :1]

        def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return xt[:, :1]

        def forward_with_features(
            self, xt: Tensor, t: Tensor, cond: Any = None
        ) -> tuple[Tensor, Tensor]:
            return xt[:, :1], xt[:, :1]

    wrong: Any = Wrong()
    give_decoder(wrong, in_a_row)
    for turn in turns(method):
        nets, teacher = scene(method)
        called: list[object] = []
        for name, net in (*nets.items(), ("teacher", teacher)):
            judges = isinstance(net, Heads)  # of features, of whatever shape
            if name != "student" and not judges and any(True for _ in net.parameters()):
                net.register_forward_hook(lambda *_, seen=called: seen.append(1))
        turn.loss(nets, teacher, source(Draws.range(0, 6)))
        if not called:  # the student alone, and features
            continue
        if turn.net == "discriminator":  # it has features, of whatever shape, and no prediction
            continue
        for name, net in nets.items():
            if name != "student" and any(True for _ in net.parameters()):
                nets[name] = wrong
        message = r"(real|prediction|x0) has shape \(6, [12]\) but \w+ has shape \(6, [12]\)"
        # "DID NOT RAISE": begin the loss with same_shape(x=x, real=p.real, fake=p.fake)
        with pytest.raises(ValueError, match=message):
            turn.loss(nets, wrong, source(Draws.range(0, 6)))


def outcome(turn: Turn, nets: Nets, teacher: Any, batch: Batch) -> Tensor | str:
    """The loss and the sums, or the sentence that refuses to compute it."""
    try:
        total, _, sums = turn.loss(nets, teacher, batch)
        parts = [*sums.values(), *(() if total is None else (total,))]
        return torch.cat([part.double().flatten() for part in parts])
    except ValueError as error:
        return str(error)


@each_class
def test_missing_inputs_are_refused(method: Method) -> None:
    nets, teacher = scene(method)
    draws = Draws.range(0, 6)
    refused = paired = 0
    for turn in turns(method):
        expected = outcome(turn, nets, teacher, source(draws))
        assert isinstance(expected, Tensor)
        found = outcome(turn, nets, teacher, source(draws)._replace(draws=None))
        if isinstance(found, str):
            assert re.search(r"make it with Draws\.range|pass draws", found)
        else:
            assert torch.equal(found, expected)  # a loss that needs no draws
        found = outcome(turn, nets, teacher, source(draws, data=False))
        if isinstance(found, str):
            assert re.match(r"\w+ needs data but Batch.x0 is None; give", found)
            refused += 1
        else:
            assert torch.equal(found, expected)  # a loss that needs no data
        found = outcome(turn, nets, teacher, source(draws, more=False))
        if isinstance(found, str):
            assert re.match(r"\w+ needs pairs of noise and the teacher's samples, but", found)
            paired += 1
        else:
            assert torch.equal(found, expected)  # a loss that needs no pairs
    assert (refused > 0) == method.needs_data
    assert (paired > 0) == (method.needs_pairs() is not None)


@each_method
def test_conditions_reach_every_call_of_every_network(method: Method) -> None:
    nets, teacher = scene(method)
    seen: list[Tensor] = []

    def told(call: Any) -> Any:
        def one(xt: Tensor, t: Tensor, cond: Any = None, **more: Any) -> Any:
            seen.append(cond)
            return call(xt, t, cond, **more)

        return one

    for net in (*nets.values(), teacher):
        if any(True for _ in net.parameters()) and not isinstance(net, Heads):
            net.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
            for name in ("encode", "forward_with_features"):  # which no hook sees
                if hasattr(net, name):
                    setattr(net, name, told(getattr(net, name)))
    for turn in turns(method):
        batch = source(Draws.range(0, 6))
        turn.loss(nets, teacher, batch)
        assert seen
        free = [cond for cond in seen if cond is None]
        same = [c is None or torch.equal(c, batch.cond.repeat(len(c) // 6)) for c in seen]
        assert all(same)
        assert len(free) < len(seen)
        guided = getattr(method, "guidance", Unguided()) != Unguided()
        assert not free or guided or getattr(method, "kappa", 1.0) != 1


def test_published_order_and_graphs() -> None:
    """The fake score moves first; only Diff-Instruct needs no graph of teacher and fake score."""
    for method in (SiD(), SIM(), DiffInstruct()):
        assert [turn.net for turn in method.turns(0)] == ["fake", "student"]
        nets, teacher = scene(method)
        graphs: list[bool] = []
        for net in (nets["fake"], teacher):
            net.register_forward_hook(lambda _, args, out, g=graphs: g.append(out.requires_grad))
        with training_only(nets, "student"):
            method.turns(0)[1].loss(nets, teacher.requires_grad_(False), source(Draws.range(0, 6)))
        assert graphs == [not isinstance(method, DiffInstruct)] * 2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(PATHS), st.floats(0.02, 0.98), st.integers(0, 2**40))
def test_any_velocity_gives_its_x0_back(path: NoisePath, share: float, number: int) -> None:
    """Round trip at any time of any path and any sample, to 1e-7 of the numbers involved."""
    low, top = max(path.t_min, 0.01), min(path.t_max, 900.0)
    t = torch.tensor([low + share * (top - low)], dtype=F64)
    draws = Draws(torch.tensor([number]))
    x0, eps = draws.normal("x0", (3,), F64), draws.normal("eps", (3,), F64)
    xt = perturb(path, x0, eps, t)
    back = velocity_to_x0(path, xt, x0_to_velocity(path, xt, x0, t), t)
    torch.testing.assert_close(back, x0, rtol=1e-7, atol=1e-7)
