"""Adapters by their formula, and a run on one set of weights beside a run on separate copies."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.diffusion.model import Model
from fewstep.methods.sid import SiD
from fewstep.nets.edm2 import Precond
from fewstep.nets.edm_layers import Conv2d, Init, Linear
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.nets.lora import ATTENTION, LoRA, Shared, pairs
from fewstep.nets.mlp import MLP
from fewstep.nets.patch_unet import PatchUNet
from fewstep.training.loop import State
from fewstep.training.modes import training_only
from fewstep.training.optim import Optim

F64 = torch.float64
EVERY = LoRA(3, alpha=1.5, targets=("*",))
MODEL = Model(MLP(width=32, blocks=2), (2,), 3, sigma_data=0.7)
SMOOTH = Optim(1e-2, (0.9, 0.99), eps=1e-3)


def stirred(net: nn.Module, seed: int = 0, size: float = 0.1) -> nn.Module:
    """The same net with noise on all of its parameters."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data += size * torch.randn(p.shape, generator=generator).to(p)
    return net


def unet(kind: str) -> nn.Module:
    if kind == "patch":
        model = Model(PatchUNet(16, (1, 2), attention=(4,)), (1, 16, 16), 3)
        return stirred(model.build())
    torch.manual_seed(0)
    options: Any = {"model_channels": 64, "channel_mult": [1, 1], "num_blocks": 1}
    return stirred(EDMPrecond(8, 1, 3, model_type=kind, attn_resolutions=[8], **options).eval())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], LoRA, tuple[int, ...]]] = {
    "mlp": (lambda: stirred(MODEL.build()), EVERY, (2,)),
    "patch unet": (lambda: unet("patch"), LoRA(2), (1, 16, 16)),
    "ddpm++": (lambda: unet("SongUNet"), EVERY, (1, 8, 8)),
    "adm": (lambda: unet("DhariwalUNet"), LoRA(4), (1, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_role_starts_as_the_teacher_and_merges_into_its_shape(name: str) -> None:
    """To the bit, taps too; after training, W + s B A in the teacher's own class answers alike."""
    make, lora, shape = NETWORKS[name]
    teacher = make().double().eval()
    role: Any = lora.adapt(teacher)
    told = torch.randn(3, *shape, dtype=F64), torch.tensor([0.1, 1.0, 9.0]), torch.arange(3)
    with torch.no_grad():
        for call in ("__call__", "encode", "forward_with_features"):
            ours, theirs = (getattr(net, call)(*told) for net in (role, teacher))
            assert all(map(torch.equal, ours, theirs))
        stirred(role)
        whole = deepcopy(teacher)
        whole.load_state_dict(lora.merged(teacher.state_dict(), role.state_dict()))
        found, expected = role(*told), whole(*told)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert (found - teacher(*told)).abs().max() > 1e-3


def test_one_graph_holds_all_of_a_role() -> None:
    """torch.compile leaves nothing to Python, and finds the same numbers."""
    role = stirred(EVERY.adapt(stirred(Model(MLP(8, 1), (2,)).build())))
    compiled = torch.compile(role, backend="eager", fullgraph=True)
    told = torch.randn(3, 2), torch.tensor([0.1, 1.0, 9.0])
    torch.testing.assert_close(compiled(*told), role(*told))


INIT = Init("kaiming_normal", 1.0, 1.0)
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 7), (2, 3, 5)),
    "without bias": (nn.Linear(5, 7, bias=False), (2, 5)),
    "cast": (Linear(5, 7, INIT), (2, 5)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 9)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding_mode="circular", padding=2), (2, 4, 9, 9)),
    "up": (Conv2d(4, 6, 3, INIT, "up"), (2, 4, 8, 8)),
    "down": (Conv2d(4, 6, 1, INIT, "down"), (2, 4, 8, 8)),
    "signals": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "films": (nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1)), (2, 2, 3, 4, 4)),
    "fused": (Conv2d(4, 6, 3, INIT, "down", (1, 3, 3, 1), fused=True), (2, 4, 8, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_gradients_by_the_formula(name: str) -> None:
    """y of W + s B A; with G the gradient of W there, those of A and B are s B'G and s G A'."""
    layer, shape = LAYERS[name]
    net = nn.Sequential(deepcopy(layer).double())
    role = stirred(EVERY.adapt(net))
    x = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    whole = deepcopy(net)
    whole.load_state_dict(EVERY.merged(net.state_dict(), role.state_dict()))
    out, expected = role(x), whole(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    expected.square().sum().backward()
    ((down, up),) = pairs(dict(role.named_parameters())).values()
    g = whole[0].weight.grad.flatten(1)
    a, b = down.flatten(1), up.flatten(1)
    torch.testing.assert_close(down.grad.flatten(1), 0.5 * b.T @ g, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(up.grad.flatten(1), 0.5 * g @ a.T, rtol=1e-10, atol=1e-10)
    assert EVERY.scale == 0.5


def storages(*nets: nn.Module) -> int:
    """Bytes of all weights and buffers, each storage once."""
    tensors = chain.from_iterable((*net.parameters(), *net.buffers()) for net in nets)
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def adapters(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters())


def test_weights_are_held_once() -> None:
    """Teacher, student, fake score and average: the teacher's bytes and three adapters'."""
    teacher = stirred(MODEL.build())
    role = EVERY.adapt(teacher)
    state = State.init(SiD(), teacher, role)
    roles = [*state.nets.values(), state.average]
    assert len(roles) == 3
    assert storages(teacher, *roles) == storages(teacher) + 3 * adapters(role)
    assert adapters(role) < storages(teacher) / 2
    copies = State.init(SiD(), teacher, teacher)
    assert storages(teacher, *copies.nets.values(), copies.average) == 4 * storages(teacher)


def test_nothing_but_the_adapters_can_be_trained_or_stored() -> None:
    teacher = stirred(MODEL.build())
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    state = State.init(SiD(), teacher, EVERY.adapt(teacher))
    names = {name for name, _ in state.nets.named_parameters()}
    assert state.nets.state_dict().keys() == names
    assert all(name.endswith((".up", ".down.weight")) for name in names)
    with training_only(state.nets, "student") as student:
        assert all(p.requires_grad for p in student.parameters())
        assert not any(b.requires_grad for b in student.buffers())
    moved = state.nets.to("cpu")
    assert storages(teacher, *moved.values()) == storages(teacher) + 2 * adapters(state.average)
    again = deepcopy(state.nets["student"])
    assert all(isinstance(b, Shared) for b in again.buffers())
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())


def test_the_seed_says_where_adapters_start() -> None:
    """A is normal of variance 1 / in, B is zero."""
    teacher = Model(MLP(256, 1), (2,)).build()
    roles = (LoRA(64, targets=("inner",)).adapt(teacher, seed) for seed in (1, 1, 2))
    (a, b), (c, _), (d, _) = (next(iter(pairs(net.state_dict()).values())) for net in roles)
    assert torch.equal(a, c)
    assert not torch.equal(a, d)
    assert abs(256 * a.square().mean() - 1) < 5 * (2 / a.numel()) ** 0.5
    assert b.count_nonzero() == 0


def test_targets_are_ends_of_names() -> None:
    net = Model(MLP(16, 2), (2,)).build()
    assert LoRA(targets=("inner",)).layers(net) == ["net.blocks.0.inner", "net.blocks.1.inner"]
    assert LoRA(targets=("1.*", "first")).layers(net) == [
        "net.first",
        *(f"net.blocks.1.{name}" for name in ("modulate", "inner", "outer")),
    ]
    assert len(LoRA(targets=("*",)).layers(net)) == 10
    adm = unet("DhariwalUNet")
    found = LoRA().layers(adm)
    assert {name.rpartition(".")[2] for name in found} == {"qkv", "proj"}
    assert "qkv" in ATTENTION
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1))
    assert EVERY.layers(grouped) == ["1"]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "rank 0": (lambda: LoRA(0), "LoRA.rank is 1 or more, got 0"),
    "alpha 0": (lambda: LoRA(4, 0.0), "LoRA.alpha is positive and finite, got 0"),
    "alpha nan": (lambda: LoRA(4, float("nan")), "LoRA.alpha is positive and finite, got nan"),
    "misspelt": (
        lambda: LoRA(targets=("iner",)).adapt(MODEL.build()),
        "LoRA: no layer of this network is named 'iner'; did you mean 'inner'?",
    ),
    "one of two": (
        lambda: LoRA(targets=("inner", "to_q")).adapt(MODEL.build()),
        "LoRA: no layer of this network is named 'to_q'; choose from first, inner, last, mix,",
    ),
    "no attention": (
        lambda: LoRA().adapt(MODEL.build()),
        r"this network has none; say which layers with targets=\(...\); it has first, inner,",
    ),
    "edm2": (
        lambda: EVERY.adapt(Precond(8, 1, 0, model_channels=8, channel_mult=[1], num_blocks=1)),
        "MPConv normalises its weight in each call",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()
