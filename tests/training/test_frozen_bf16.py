"""Frozen weights held in bfloat16: under autocast the same bits, and nowhere another network."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.config import build
from fewstep.data.batches import Latents
from fewstep.methods.sid import SiD
from fewstep.nets.activation_checkpointing import recompute
from fewstep.nets.edm2 import Precond
from fewstep.nets.lora import LAYERS
from fewstep.recipes.digits import digits, digits_teacher
from fewstep.runs.run import Run
from fewstep.training.loop import State, train
from fewstep.training.precision import Precision, autocast_products, store_in_bf16
from tests.nets.test_lora import EVERY, MODEL, NETWORKS, SMOOTH, stirred

CPU, BF16 = torch.device("cpu"), torch.bfloat16


def answered(net: Any, precision: Precision, shape: tuple[int, ...]) -> list[Tensor]:
    """The denoised, its features, and the gradient at x_t."""
    generator = torch.Generator().manual_seed(2)
    xt = torch.randn(3, *shape, generator=generator, requires_grad=True)
    with autocast_products(precision, CPU):
        out, features = net.forward_with_features(
            xt, torch.tensor([0.1, 1.0, 9.0]), torch.arange(3)
        )
    (slope,) = torch.autograd.grad(out.square().sum() + features.float().square().sum(), xt)
    return [out.detach(), features.detach(), slope]


def rounded(net: nn.Module) -> nn.Module:
    """A float32 copy whose products' weights are rounded."""
    copy = deepcopy(net)
    for layer in copy.modules():
        if isinstance(layer, LAYERS) and layer.weight is not None:
            layer.weight.data = layer.weight.data.bfloat16().float()
    return copy


@pytest.mark.parametrize("name", NETWORKS)
def test_the_bits_under_autocast_and_the_rounded_network_without(name: str) -> None:
    """Answers, features and gradients; biases stay. Control: the weights were no round numbers."""
    make, _, shape = NETWORKS[name]
    net = make().requires_grad_(False).eval()
    held = deepcopy(net)
    store_in_bf16(held)
    low, exact = (answered(net, precision, shape) for precision in ("bf16", "fp32"))  # type: ignore[arg-type]
    assert all(map(torch.equal, answered(held, "bf16", shape), low))
    found = answered(held, "fp32", shape)
    assert all(map(torch.equal, found, answered(rounded(net), "fp32", shape)))
    assert 1e-4 < float((found[0] - exact[0]).norm() / exact[0].norm()) < 0.02
    assert all(map(torch.equal, answered(deepcopy(held), "bf16", shape), low))
    kinds = {name: t.dtype for name, t in held.named_parameters()}
    assert {t for name, t in kinds.items() if name.endswith("bias")} == {torch.float32}
    numbers = dict.fromkeys(kinds.values(), 0)
    for t in held.parameters():
        numbers[t.dtype] += t.numel()
    assert numbers[BF16] > 0.8 * sum(numbers.values())


def test_networks_without_such_layers_are_refused() -> None:
    """EDM2's normalise their weights in every call."""
    net = Precond(8, 3, 0, model_channels=16, channel_mult=[1], num_blocks=1)
    with pytest.raises(ValueError, match="Precond has no linear layers or convolutions whose"):
        store_in_bf16(net)


def ends(held: bool, adapters: bool, again: bool = False) -> list[Tensor]:
    """Everything trained in 6 steps of SiD on a held teacher, or on one that is not."""
    teacher = stirred(MODEL.build()).requires_grad_(False).eval()
    if adapters and held:
        store_in_bf16(teacher)
    net: nn.Module = EVERY.adapt(teacher) if adapters else teacher
    for part in (net, teacher) if again else ():
        recompute(part)
    state = State.init(SiD(), teacher, net)
    if held and not adapters:
        store_in_bf16(teacher)
    settings: Any = {"batch": 8, "steps": 6, "optim": SMOOTH, "precision": "bf16"}
    for _ in train(SiD(), teacher, net, Latents((2,), 3), state=state, **settings):
        pass
    assert any(p.dtype == BF16 for p in teacher.parameters()) == held
    tensors = [*state.nets.parameters(), *state.average.parameters()]
    assert {t.dtype for t in tensors} == {torch.float32}
    return tensors


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_run_has_the_bits_of_one_that_holds_float32(adapters: bool, again: bool) -> None:
    """Student, fake score and average, with activations computed again too."""
    assert all(map(torch.equal, ends(True, adapters, again), ends(False, adapters, again)))


@pytest.mark.parametrize(
    ("run", "changes", "sentence"),
    [
        (digits, {}, "this run is in fp32"),
        (digits, {"precision": "fp16"}, "this run is in fp16"),
        (digits_teacher, {"precision": "bf16"}, "this run trains one"),
    ],
)
def test_where_it_would_change_what_is_computed_it_is_refused(
    run: Any, changes: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        build(Run, vars(run()) | {"frozen": "bf16", **changes})
