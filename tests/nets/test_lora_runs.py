"""A run on one set of weights beside a run on three separate copies of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fewstep.data.batches import Images, Latents
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.distillation.critic import Critic
from fewstep.distillation.discriminator_head import DenoiserWithHead
from fewstep.distillation.method import Method
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.methods.sim import SIM
from fewstep.nets.activation_checkpointing import recompute
from fewstep.nets.lora import LoRA, pairs
from fewstep.training.ema import EMA
from fewstep.training.loop import Record, State, train
from fewstep.training.optim import Optim
from fewstep.training.precision import Precision
from tests.nets.test_lora import EVERY, MODEL, SMOOTH, stirred, storages

pytestmark = pytest.mark.slow


class Product(nn.Module):
    """W -> W + s B A, as a parametrisation of torch's."""

    def __init__(self, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down.clone()), nn.Parameter(up.clone())
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.up @ self.down


def separate(teacher: nn.Module, start: Mapping[str, Tensor], lora: LoRA) -> nn.Module:
    """A copy of all weights with the same adapters, made without `fewstep.nets.lora`."""
    net = deepcopy(teacher).requires_grad_(False)
    for name, (down, up) in pairs(start).items():
        product = Product(down, up, lora.scale)
        parametrize.register_parametrization(net.get_submodule(name), "weight", product)
    return net


def by_hand(method: Method, teacher: nn.Module, nets: nn.ModuleDict, source: Any) -> Iterator[Any]:
    """The losses of steps of 16 samples, descended with Adam on the adapters."""
    trained = {
        name: [
            p
            for key, p in net.named_parameters()
            if key.endswith((".down", ".up")) or key.startswith("head.")
        ]
        for name, net in nets.items()
    }
    adam = {name: torch.optim.Adam(ps, 1e-2, (0.9, 0.99), 1e-3) for name, ps in trained.items()}
    drawn = step = 0
    while True:
        losses = {}
        for turn in method.turns(step):
            for name, parameters in trained.items():
                for p in parameters:
                    p.requires_grad_(name == turn.net)
            loss = turn.loss(nets, teacher, source(Draws.range(drawn, 16, 0))).total
            adam[turn.net].zero_grad()
            loss.backward()
            adam[turn.net].step()
            losses[f"{turn.net}/loss"] = loss.item()
            drawn += 16
        step += 1
        yield losses


X0 = torch.randn(64, 2, generator=torch.Generator().manual_seed(3))
COMPARED: dict[str, tuple[Method, Any]] = {
    "sid": (SiD(alpha=1.0), Latents((2,), 3)),
    "sid of four steps": (SiD(FewStep(2.5, 4)), Latents((2,), 3)),
    "sim": (SIM(), Latents((2,), 3)),
    "diff-instruct": (DiffInstruct(), Latents((2,), 3)),
    "dmd2": (DMD2(ratio=2), Images(X0, torch.arange(64) % 3)),
    "sida": (SiDA(fake=Critic(scale=0.5), gan=0.1), Images(X0, torch.arange(64) % 3)),
}


@pytest.mark.parametrize("name", COMPARED)
def test_results_are_those_of_three_separate_copies(name: str) -> None:
    """Losses and weights of 8 steps, to 1e-5; the base does not move by a bit."""
    method, source = COMPARED[name]
    teacher = stirred(MODEL.build()).requires_grad_(False).eval()
    bits = {key: t.clone() for key, t in teacher.state_dict().items()}
    role = EVERY.adapt(teacher)
    nets = nn.ModuleDict(
        {k: separate(teacher, role.state_dict(), EVERY) for k in ("student", "fake")}
    )
    assert storages(teacher, *nets.values()) > 3 * storages(teacher)
    if isinstance(method, DMD2):
        nets = method.fake.equipped(nets)
    told = by_hand(method, deepcopy(teacher), nets, source)
    records = train(method, teacher, role, source, batch=16, steps=8, optim=SMOOTH)
    for record in records:
        for key, expected in next(told).items():
            assert record.logs[key] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for key, net in record.state.nets.items():
        adapters, copy = net.state_dict(), nets[key]
        if isinstance(net, DenoiserWithHead):  # all of the head is trained, and is the same
            torch.testing.assert_close(net.head.state_dict(), nets[key].head.state_dict())
            adapters, copy = net.net.state_dict(), nets[key].net
        whole = EVERY.merged(bits, adapters)
        moved = 0.0
        for layer in pairs(adapters):
            weight: Any = copy.get_submodule(layer).weight.detach()
            torch.testing.assert_close(whole[f"{layer}.weight"], weight, rtol=1e-5, atol=1e-5)
            moved = max(moved, float((weight - bits[f"{layer}.weight"]).abs().max()))
        assert moved > 1e-2
    assert unmoved(teacher, bits)


def unmoved(net: nn.Module, bits: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(bits[key], t) for key, t in net.state_dict().items())


def test_a_base_that_could_be_trained_would_be_seen() -> None:
    """The check above fails where one frozen tensor is a parameter on the teacher's memory."""
    teacher = stirred(MODEL.build())
    bits = {key: t.clone() for key, t in teacher.state_dict().items()}

    def after(leak: bool) -> Record:
        role: Any = EVERY.adapt(teacher)
        if leak:
            layer = role.net.first.base
            del layer.weight
            layer.weight = nn.Parameter(teacher.net.first.weight.detach())
        init: Any = SiD.init
        nets = init(SiD(), teacher, role)
        if leak:  # a copy would have memory of its own
            nets["student"].net.first.base.weight = layer.weight
        state = State(nets, deepcopy(nets["student"]).requires_grad_(False))
        source = Latents((2,), 3)
        *_, last = train(SiD(), teacher, role, source, batch=8, steps=2, state=state)
        return last

    after(leak=False)
    assert unmoved(teacher, bits)
    after(leak=True)
    assert not unmoved(teacher, bits)


def test_the_average_is_of_adapters() -> None:
    """With no half-life it is the student; with a long one it lies between start and end."""
    teacher = stirred(MODEL.build())

    def state(ema: EMA) -> State:
        role = EVERY.adapt(teacher)
        settings: Any = {"batch": 8, "steps": 4, "ema": ema, "optim": SMOOTH}
        *_, last = train(SiD(), teacher, role, Latents((2,), 3), **settings)
        return last.state

    last = state(EMA(0.0))
    assert all(map(torch.equal, last.average.parameters(), last.nets["student"].parameters()))
    ups = [p for name, p in state(EMA(1e4, 1e4)).average.named_parameters() if "up" in name]
    ends = [p for name, p in last.nets["student"].named_parameters() if "up" in name]
    for mean, end in zip(ups, ends, strict=True):
        assert 0 < mean.norm() < end.norm()


def first_gradients(precision: Precision) -> Tensor:
    """Half of them, of adapters far from their start: Adam's first moment with beta_1 = 1/2."""
    teacher = stirred(MODEL.build())
    bits = {key: t.clone() for key, t in teacher.state_dict().items()}
    role = stirred(EVERY.adapt(teacher), seed=1)
    settings: Any = {"batch": 64, "optim": Optim(1e-6, (0.5, 0.9)), "precision": precision}
    (record,) = train(SiD(alpha=1.0), teacher, role, Latents((2,), 3), steps=1, **settings)
    state = record.state
    moments = [s["exp_avg"] for o in state.optimizers.values() for s in o.state.values()]
    tensors = [*state.nets.parameters(), *state.average.parameters(), *moments]
    assert {t.dtype for t in tensors} == {torch.float32}
    assert record.logs["skipped"] == 0
    assert unmoved(teacher, bits)
    return torch.cat([m.flatten() for m in moments])


def test_gradients_in_lower_precision() -> None:
    """Relative errors as whole networks have them; adapters and moments stay in float32."""
    exact = first_gradients("fp32")
    low = {p: (first_gradients(p) - exact).norm() / exact.norm() for p in LOW}
    assert 1e-4 < low["bf16"] < 0.03
    assert 1e-5 < low["fp16"] < 0.004


LOW: tuple[Precision, ...] = ("bf16", "fp16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_computed_again_give_the_same_bits(precision: Precision) -> None:
    def ends(again: bool) -> list[Tensor]:
        teacher = stirred(MODEL.build())
        role = EVERY.adapt(teacher)
        for net in (role, teacher) if again else ():
            recompute(net)
        settings: Any = {"batch": 8, "steps": 3, "optim": SMOOTH, "precision": precision}
        *_, last = train(SiD(), teacher, role, Latents((2,), 3), **settings)
        return list(last.state.nets.parameters())

    assert all(map(torch.equal, ends(True), ends(False)))
