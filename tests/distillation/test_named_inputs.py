"""Students that are told more: description and network say the same names, each once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.distillation.named_inputs import model_with, net_with
from fewstep.nets.mlp import MLP
from tests.networks import stirred

MODEL = Model(MLP(16, 1), (2,))


def test_description_and_network_have_the_same_names_once() -> None:
    net: Any = MODEL.build(1)
    model = MODEL
    for name in ("s", "w", "s"):
        model, net = model_with(model, name), net_with(net, name)
    assert model == replace(MODEL, inputs=("s", "w"))
    assert net.input_names == ("s", "w")
    built = model.build().state_dict()
    assert {k: v.shape for k, v in built.items()} == {
        k: v.shape for k, v in net.state_dict().items()
    }


def test_it_is_a_copy_that_does_not_hear_the_number_at_first() -> None:
    net: Any = MODEL.build(1)
    student: Any = net_with(net, "w")
    draws = Draws.range(0, 4)
    x, t = draws.normal("x", (2,)), draws.uniform("t")
    assert torch.equal(student(x, t, w=t), net(x, t))
    stirred(student, 3)
    assert not torch.equal(student(x, t, w=t), net(x, t))
    assert not torch.equal(student(x, t, w=t), student(x, t, w=t + 1))
    again: Any = net_with(student, "w")
    assert again is not student
    assert torch.equal(again(x, t, w=t), student(x, t, w=t))
