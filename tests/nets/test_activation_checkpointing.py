"""Activations that are computed again: the same bits from fewer stored ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fewstep.data.batches import Latents
from fewstep.diffusion.model import Model
from fewstep.diffusion.samplers import FewStep
from fewstep.distillation.fake_score import FakeScore
from fewstep.methods.sid import SiD
from fewstep.nets.activation_checkpointing import recompute
from fewstep.nets.edm2 import Precond
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.nets.mlp import MLP
from fewstep.nets.patch_unet import PatchUNet
from fewstep.training.loop import train
from tests.command import bits, fewstep

UNET: dict[str, Any] = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 2}


def edm(kind: str, **more: Any) -> nn.Module:
    return EDMPrecond(8, 1, model_type=kind, attn_resolutions=[4], dropout=0.2, **UNET, **more)


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Model(MLP(64, 6), (1, 8, 8)).build,
    "patches": Model(PatchUNet(16, (1, 2), 2, dropout=0.2), (1, 8, 8)).build,
    "adm": lambda: edm("DhariwalUNet"),
    "ddpm++": lambda: edm("SongUNet"),
    "ncsn++": lambda: edm("SongUNet", encoder_type="residual", decoder_type="skip"),
    "edm2": lambda: Precond(8, 1, 0, dropout=0.2, channels_per_head=16, **UNET),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A network as it is, and one that computes again; every branch of it matters."""
    torch.manual_seed(0)
    net = NETS[name]()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    lean = deepcopy(net)
    recompute(lean)
    return net, deepcopy(lean)  # as methods copy the network that they are given


def stored(f: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """f(), and the bytes that it keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        return f(), sum(kept.values())


def step(net: Any, training: bool) -> tuple[dict[str, Tensor], int]:
    """The gradients of a loss on prediction and features, also by x; the bytes it kept."""
    torch.manual_seed(1)
    x, t = torch.randn(16, 1, 8, 8, requires_grad=True), torch.linspace(0.1, 3, 16)
    net.train(training).requires_grad_(training)

    def loss() -> Tensor:
        out, features = net.forward_with_features(x, t)
        total: Tensor = out.square().mean() + features.square().mean()
        return total

    total, kept = stored(loss)
    total.backward()
    assert x.grad is not None
    found = {"x": x.grad, "loss": total.detach(), "next": torch.rand(1)}
    found |= {name: p.detach().clone() for name, p in net.named_parameters()}
    found |= {f"d {n}": p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    return found, kept


@pytest.mark.parametrize("training", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", NETS)
def test_gradients_are_the_same_and_less_is_kept(name: str, training: bool) -> None:
    """With dropout, through the encoder tap, and for a frozen network, through which the
    student's gradient flows. torch's generator goes on as before."""
    (whole, much), (lean, little) = (step(net, training) for net in pair(name))
    assert whole.keys() == lean.keys()
    assert ("d" in {key[0] for key in whole}) == training
    for key in whole:
        assert torch.equal(whole[key], lean[key]), key
    assert little < 0.6 * much


@pytest.mark.parametrize(("name", "training"), [("mlp", True), ("adm", True), ("adm", False)])
def test_generators_are_remembered_where_they_were_drawn_from(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 kB a block on a CPU, kept between the passes of a network with dropout alone."""
    states: list[weakref.ref[Tensor]] = []
    now = torch.get_rng_state

    def noted() -> Tensor:
        state = now()
        states.append(weakref.ref(state))
        return state

    monkeypatch.setattr(torch, "get_rng_state", noted)
    net: Any = pair(name)[1].train(training)
    blocks = [m for m in net.modules() if "forward" in vars(m)]
    out = net(torch.randn(2, 1, 8, 8, requires_grad=True), torch.ones(2))
    kept = sum(state() is not None for state in states)
    assert len(states) >= 2 * len(blocks) > 4
    assert (0 < kept <= len(blocks)) if training and name == "adm" else kept == 0
    out.sum().backward()


def test_another_repetition_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: torch's generators are not put back, so that dropout draws other numbers."""
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    (whole, _), (lean, _) = (step(net, True) for net in pair("adm"))
    assert torch.equal(whole["loss"], lean["loss"])
    assert not torch.equal(whole["x"], lean["x"])


def test_training_has_the_same_bits() -> None:
    """SiD on small networks with dropout, the fake score and the teacher being lean too."""
    ends = []
    for net in pair("patches"):
        method = SiD(FewStep(2.5), fake=FakeScore())
        source, size = Latents((1, 8, 8)), {"batch": 8, "accumulate": 2}
        records = list(train(method, deepcopy(net), net, source, steps=2, **size))
        ends.append(records[-1].state.nets.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.slow
def test_the_command_and_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same student from --recompute; a network without blocks is refused in a sentence."""
    monkeypatch.chdir(tmp_path)
    run = ("distill", "mixture", "--steps", "3", "--sample-every", "3", "--batch", "16")
    small = ("--model.net.width", "16", "--model.net.blocks", "2")
    assert fewstep(*run, *small, "--out", "a").code == 0
    done = fewstep(*run, *small, "--out", "b", "--recompute")
    assert (done.code, done.err.splitlines()[-1]) == (0, "finished: b")
    assert bits(Path("a/student")) == bits(Path("b/student"))
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        recompute(nn.Linear(2, 2))
