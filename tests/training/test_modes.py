"""One net is trained at a time; the rest is frozen, in whatever mode it was before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fewstep.distillation.method import Nets
from fewstep.training.modes import Switch, Switches, training_only


class Still(nn.Linear):
    """In evaluation mode always."""

    def train(self, mode: bool = True) -> Still:
        return super().train(False)


def net() -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    return nn.Sequential(inner, nn.BatchNorm1d(2), inner)


def state(module: nn.Module) -> tuple[set[bool], set[bool]]:
    return {p.requires_grad for p in module.parameters()}, {m.training for m in module.modules()}


def test_one_net_is_trained_at_a_time() -> None:
    nets = Nets({"student": net(), "fake": net()})
    switches = Switches(nets)
    for name, other in (("student", "fake"), ("fake", "student")):
        assert [state(n) for n in nets.values()] == [({False}, {False})] * 2
        with switches.training(name) as trained:
            assert trained is nets[name]
            assert state(nets[name]) == ({True}, {True})
            assert state(nets[other]) == ({False}, {False})
    with pytest.raises(ZeroDivisionError), training_only(nets, "fake"):
        raise ZeroDivisionError
    assert [state(n) for n in nets.values()] == [({False}, {False})] * 2


def test_modules_keep_their_own_way() -> None:
    """Of changing their mode; a plain walk through all modules would pass over it."""
    module = nn.Sequential(Still(2, 2), nn.Dropout())
    Switch(module).set(True)
    assert [m.training for m in module] == [False, True]
    assert all(p.requires_grad for p in module.parameters())
    switch = Switch(module)
    switch.own = False
    switch.set(True)
    assert [m.training for m in module] == [True, True]


def test_weights_of_two_nets_are_trained_with_either() -> None:
    shared: Any = nn.Linear(2, 2)
    nets = Nets({"student": nn.Sequential(shared), "fake": nn.Sequential(shared, nn.Dropout())})
    for name in nets:
        with training_only(nets, name):
            assert shared.weight.requires_grad
        assert not shared.weight.requires_grad
    assert torch.equal(nets["student"](torch.zeros(1, 2)), shared.bias[None])
