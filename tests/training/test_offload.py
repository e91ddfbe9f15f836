"""What rests in main memory, on a machine that has no other: where it would go, and when.

Moves are recorded and copy, or go to the meta device, which forgets; both end in the same bits
or in none. On an accelerator none of this has been run.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batches import Latents
from fewstep.diffusion.model import Model
from fewstep.methods.sid import SiD
from fewstep.nets.mlp import MLP
from fewstep.training import offload
from fewstep.training.loop import train
from fewstep.training.offload import OffloadedModule
from fewstep.training.optim import Optim
from tests.command import bits, fewstep

MODEL = Model(MLP(width=16, blocks=1), (2,))
SETTINGS: dict[str, Any] = {"batch": 8, "steps": 3}


def trained(optim: Optim) -> dict[str, Tensor]:
    net = MODEL.build(1)
    records = list(train(SiD(), deepcopy(net), net, Latents((2,)), optim=optim, **SETTINGS))
    return records[-1].state.nets.state_dict()


@pytest.mark.parametrize(("beta", "moments"), [(0.0, 1), (0.9, 2)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_moments_come_for_their_update_and_leave(
    decay: float, beta: float, moments: int, monkeypatch: Any
) -> None:
    """All moments of every weight of the net whose turn it is, and nothing else; same bits."""
    moves: list[tuple[int, str]] = []
    sizes = [p.numel() for p in MODEL.build().parameters()]

    def moved(t: Tensor, device: torch.device) -> Tensor:
        moves.append((t.numel(), str(device)))
        return t.clone()

    monkeypatch.setattr(offload, "moved", moved)
    monkeypatch.setattr(offload, "REST", "rest")
    optim = Optim(betas=(beta, 0.99), weight_decay=decay)
    there = trained(optim)
    assert moves == []
    away = trained(replace(optim, offload=True))
    assert all(torch.equal(there[key], away[key]) for key in there)
    out, back = ([(n, where) for n in sizes for _ in range(moments)] for where in ("rest", "cpu"))
    assert moves == 2 * out + 2 * 2 * (back + out)  # two nets; nothing to fetch at first


@pytest.mark.parametrize("bits", [32, 8])
def test_between_updates_the_device_holds_no_moment(bits: Any, monkeypatch: Any) -> None:
    """With the meta device for main memory they are gone: the next update cannot be made."""
    if bits == 8:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(offload, "REST", torch.device("meta"))
    net = nn.Linear(64, 64)
    optimizer = Optim(offload=True, bits=bits).build(net.parameters())
    net(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    for entry in optimizer.state.values():
        assert all(t.is_meta for name, t in entry.items() if name != "step")
        assert float(entry["step"]) == 1.0
    assert len(optimizer.state[net.weight]) == (2 if bits == 32 else 5)
    with pytest.raises(NotImplementedError, match="meta"):
        optimizer.step()


class Travelling(nn.Module):
    """Writes down where it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.trips: list[str] = []

    def to(self, device: Any) -> Any:  # type: ignore[override]
        self.trips.append(str(device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.trips.append("called")
        return x


def test_a_network_rests_until_it_is_called() -> None:
    net = Travelling()
    resting = OffloadedModule(net, torch.device("cuda:1"))
    for calls in (2, 0, 1):
        for _ in range(calls):
            net(torch.ones(1))
        resting.rest()
    assert net.trips == ["cpu", "cuda:1", "called", "called", "cpu", "cuda:1", "called", "cpu"]


def test_the_teacher_is_fetched_once_a_step_for_the_student(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """And the command's student is the same."""
    monkeypatch.chdir(tmp_path)
    order: list[str] = []

    def noted(name: str, call: Any) -> Any:
        def noting(self: Any, *args: Any) -> Any:
            order.append(f"{name} {self.awake}" if isinstance(self, OffloadedModule) else name)
            return call(self, *args)

        return noting

    for cls, name in (
        (OffloadedModule, "rest"),
        (OffloadedModule, "_wake"),
        (SiD, "student_loss"),
    ):
        monkeypatch.setattr(cls, name, noted(name, getattr(cls, name)))
    small = ("--steps", "3", "--sample-every", "3", "--batch", "16", "--model.net.width", "16")
    for flags in ((), ("--offload", "--optim.offload")):
        out = "b" if flags else "a"
        done = fewstep("distill", "mixture", *small, *flags, "--out", out)
        assert (done.code, done.err.splitlines()[-1]) == (0, f"finished: {out}")
        order += ["and"]
    assert order[:4] == ["student_loss"] * 3 + ["and"]
    step = ["student_loss", "_wake False", "rest True"]
    assert order[4:13] == ["rest True", *step, *step, *step[:2]]
    assert bits(Path("a/student")) == bits(Path("b/student"))
