"""One whole iteration of the official SiD code, replayed by our method, network and loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras
from fewstep.methods.sid import SiD
from tests.recorded_steps import (
    HALVES,
    MARKS,
    Recording,
    Replayed,
    Unaugmented,
    errors,
    in_double,
    missed,
)


@pytest.fixture(scope="module", params=["step_sid", "step_sid_cond"])
def gold(request: pytest.FixtureRequest) -> Recording:
    return Recording.named(request.param)


def method(gold: Recording, controls: Any = None, **changes: Any) -> Replayed:
    """SiD as recorded, but for `changes`; it told the fake score nothing of augmentation."""
    alpha, tmax, t_init = (gold.config[key] for key in ("alpha", "tmax", "init_sigma"))
    settings = {"sampler": FewStep(t_init), "alpha": alpha, "times": Karras(tmax=tmax)}
    inner = SiD(**settings | changes)
    return Replayed(inner.sampler, inner, **controls or {})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_iteration_is_the_recorded_one(gold, accumulate):
    found = errors(gold, method(gold), accumulate=accumulate)
    assert len(found) == 12
    assert missed(found) == set()


def test_recorded_student_loss_is_itself_rounded_by_as_much(gold):
    """Why gen/elem has a mark of its own: float64 is 1.3e-5 away from the recording too."""
    assert MARKS["elem"] < in_double(gold, method(gold)) < MARKS["gen/elem"]


def test_augment_labels_of_zeros_are_none_at_all(gold):
    net, x, t = gold.net("student"), gold["draws"]["z_g"], torch.tensor(2.5)
    assert torch.equal(Unaugmented(net)(x, t), net(x, t))
    assert not gold["grads_student"]["model.map_augment.weight"].any()
    assert "model.map_augment.weight" not in gold["grads_fake"]


@pytest.mark.parametrize("net", ["fake", "student"])
def test_the_trained_net_alone_is_in_training_mode(gold, net):
    """The recorded nets had no dropout; it shows where a net with dropout is being trained."""
    turn, others = method(gold, {"order": (net,)}), {"teacher", "student", "fake"} - {net}
    assert missed(errors(gold, turn, dropout=others)) == set()
    assert f"{HALVES[net]}/elem" in missed(errors(gold, turn, dropout={net}))


@pytest.mark.parametrize("net", ["teacher", "fake"])
def test_control_detached_or_in_training_mode(gold, net):
    """Losses do not notice a detached prediction; gradients, hence weights, do."""
    found = missed(errors(gold, method(gold, {"after": {net: Tensor.detach}})))
    assert found == {"gen/grads", "gen/after", "gen/ema move"}
    wrong = method(gold, {"order": ("student",), "training": (net,)})
    assert {"gen/elem", "gen/total", "gen/grads"} <= missed(errors(gold, wrong, dropout={net}))


@pytest.mark.parametrize("changes", [{"alpha": 1.0}, {"times": Karras(tmax=1000.0)}])
def test_control_other_settings(gold, changes):
    assert {"gen/elem", "gen/total"} <= missed(errors(gold, method(gold, **changes)))


def test_control_other_order_and_early_average(gold):
    """The student's half must see the fake score after its update; the ramp must be over."""
    found = missed(errors(gold, method(gold, {"order": ("student", "fake")}), images=0))
    assert {"gen/elem", "psi/elem", "gen/ema", "gen/ema move"} <= found
