"""What networks start from: the teacher, or another network that the student is told to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.denoisers import EDM
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE
from fewstep.distillation.method import Method
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.methods.sim import SIM
from fewstep.nets.lora import LoRA
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training.loop import State

MODEL = Model(MLP(16, 1), (2,))
METHODS: list[Method] = [SiD(), SIM(), DiffInstruct(), SiDA()]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


def values(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@each_method
def test_a_student_with_a_start_of_its_own(method: Method) -> None:
    """SiD2A: the student and its average are that network, the fake score is the teacher."""
    teacher, net = MODEL.build(1), MODEL.build(2)
    state = State.init(method, teacher, net)
    assert torch.equal(values(state.nets["student"]), values(net))
    assert torch.equal(values(state.average), values(net))
    assert torch.equal(values(state.nets["fake"]), values(teacher))
    assert not torch.equal(values(teacher), values(net))
    addresses = [
        {p.data_ptr() for p in each.parameters()} for each in (teacher, net, *state.nets.values())
    ]
    assert len(set.union(*addresses)) == sum(map(len, addresses))  # all are copies


class Other(EDM):
    """Another class of denoiser with parameters of the same names and shapes."""


def shaped(kind: Any = EDM, **changes: Any) -> Any:
    """A teacher like the student but for its class, width, depth or classes."""
    settings = {"width": 16, "blocks": 1, "classes": 0} | changes
    torch.manual_seed(7)  # not that of MODEL.build, whatever ran before
    net = MLP(settings["width"], settings["blocks"]).build((2,), settings["classes"])
    return kind(net, VE())


@each_method
@pytest.mark.parametrize(
    "teacher",
    [None, GaussianMixture.ring(), lambda xt, t, cond=None: xt],
    ids=["none", "exact", "function"],
)
def test_a_fake_score_beside_a_teacher_without_weights(method: Method, teacher: Any) -> None:
    """It starts as the student does."""
    net = MODEL.build(2)
    nets = method.init(teacher, net)
    assert torch.equal(values(nets["student"]), values(net))
    assert torch.equal(values(nets["fake"]), values(net))
    assert nets["fake"] is not nets["student"]


@each_method
@pytest.mark.parametrize(
    "teacher",
    [shaped(), shaped(Other), shaped(width=32), shaped(blocks=2), shaped(width=8)],
    ids=["same", "class", "width", "depth", "narrow"],
)
def test_a_student_of_another_architecture(method: Method, teacher: Any) -> None:
    """The student is the network given; the fake score is the teacher, whatever its size."""
    net = MODEL.build(2)
    nets = method.init(teacher, net)
    assert torch.equal(values(nets["student"]), values(net))
    assert torch.equal(values(nets["fake"]), values(teacher))
    assert nets["fake"] is not teacher


@each_method
def test_adapters_are_adapters_in_every_role(method: Method) -> None:
    """A network that trains adapters on the teacher's own weights is both student and fake."""
    teacher = shaped(width=32)
    net = LoRA(4, targets=("outer",)).adapt(teacher)
    nets = method.init(teacher, net)
    assert {n for n, _ in nets["fake"].named_parameters()} == {
        n for n, _ in net.named_parameters()
    }
    assert sum(p.numel() for p in nets["fake"].parameters()) < 1000
