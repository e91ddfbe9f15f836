"""Networks with several output layers: the teacher's at the start, mixtures by linearity."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.config import decode, encode
from fewstep.diffusion.extra_inputs import ExtraInputs
from fewstep.diffusion.heads import Heads, output_layer
from fewstep.diffusion.model import Model
from fewstep.methods.sid import SiD
from fewstep.nets.lora import LoRA
from fewstep.nets.mlp import MLP
from fewstep.storage.model_folder import load_student, save_student
from tests.networks import NETS, samples, shape_of, stirred

NAMES = ("mlp", "mlp, vp", "patches", "tokens", "adm", "edm2")
each_net = pytest.mark.parametrize("name", NAMES)
MODEL = Model(MLP(16, 1), (2,), 3, heads=3)
X, T = torch.linspace(-1, 1, 4).reshape(2, 2), torch.tensor([0.3, 1.7])


def made(name: str, count: int = 3) -> tuple[Any, Any, list[Tensor]]:
    """A denoiser, the same with heads of other weights, and arguments."""
    net = stirred(NETS[name]()).eval()
    heads = Heads(deepcopy(net), count)
    stirred(heads.layers, 1)
    xt, t, cond, _ = samples(net, shape_of(name), 2)
    return net, heads, [xt, t, cond]


@each_net
def test_heads_start_as_the_denoiser(name: str) -> None:
    """All of them, to rounding, and the mixture too; the network inside stays as it was."""
    net, _, args = made(name)
    heads = Heads(net, 3)
    with torch.no_grad():
        want = net(*args)
        torch.testing.assert_close(heads(*args), want)
        for g in heads.answers(*args):
            torch.testing.assert_close(g, want)
        torch.testing.assert_close(heads(*args, mix=(0.2, 0.3, 0.5)), want)
        assert torch.equal(net(*args), want)


@each_net
def test_answers_are_those_of_each_layer(name: str) -> None:
    """Head k is the network with its output layer in place of the own one; mixtures are linear."""
    net, heads, args = made(name)
    with torch.no_grad():
        answers = heads.answers(*args)
        for k in range(3):
            output_layer(net).load_state_dict(heads.layers[k].state_dict())
            torch.testing.assert_close(answers[k], net(*args), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads(*args), answers[0], rtol=1e-4, atol=1e-5)
        if name != "edm2":  # whose layers have weights of unit size, which mixtures have not
            mixed = 0.3 * answers[0] + 0.7 * answers[2]
            torch.testing.assert_close(
                heads(*args, mix=(0.3, 0.0, 0.7)), mixed, rtol=1e-4, atol=1e-5
            )
    assert (answers[0] - answers[1]).abs().max() > 1e-3


def test_heads_of_a_network_with_further_inputs() -> None:
    net, heads, args = made("mlp")
    told = stirred(ExtraInputs(net, ("w",)))
    several, w = Heads(told, 2), torch.tensor([0.5, 2.0])
    want = told(*args, w=w)
    torch.testing.assert_close(several.answers(*args, w=w)[1], want)
    assert (want - told(*args)).abs().max() > 1e-3
    assert Heads(heads, 5).net is heads.net


def test_a_network_that_says_no_output_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear does not say where its output layer is"):
        Heads(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match="1 head or more"):
        Heads(NETS["mlp"](), 0)


def test_a_model_with_heads_is_recorded_and_read_again(tmp_path: Path) -> None:
    assert decode(json.loads(json.dumps(encode(MODEL))), Model) == MODEL
    net: Any = stirred(MODEL.build())
    save_student(tmp_path / "student", net, MODEL, SiD(), {})
    again = load_student(tmp_path / "student")
    assert again.model == MODEL
    assert torch.equal(again.denoiser.answers(X, T), net.answers(X, T))
    plain = replace(MODEL, heads=1)
    carried = plain.carried(plain.build().state_dict(), MODEL)
    assert carried.keys() == {k for k in net.state_dict() if not k.startswith("layers.")}


def test_with_adapters_the_heads_are_trained_in_full() -> None:
    """Beside the adapters of the layers inside."""
    _, heads, args = made("mlp")
    role: Any = LoRA(2, targets=("inner",)).adapt(heads)
    torch.testing.assert_close(role.answers(*args), heads.answers(*args))
    names = {name.rpartition(".")[0] for name, _ in role.named_parameters()}
    assert {"layers.0", "layers.1", "layers.2"} <= names
    assert all("last" not in name for name in names)
