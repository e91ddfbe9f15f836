"""Constants: the numbers of `new_tensor`, by a copy that waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.constants import beside, constant
from tests.waiting import Waits

VALUES = (0.1, 1 / 3, 80.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_on_a_cpu_it_is_new_tensor(dtype: torch.dtype) -> None:
    like = torch.zeros(2, dtype=dtype)
    assert torch.equal(constant(VALUES, like), like.new_tensor(VALUES))
    host = torch.tensor(VALUES, dtype=torch.float64)
    assert torch.equal(beside(host, like), host.to(like))


def test_elsewhere_nothing_is_waited_for() -> None:
    like = torch.zeros(2, dtype=torch.float64, device="meta")
    with Waits() as seen:
        made = constant(VALUES, like), beside(torch.tensor(VALUES), like)
    assert [(m.device.type, m.dtype, m.shape) for m in made] == [("meta", like.dtype, (3,))] * 2
    assert seen.places == []


@pytest.mark.parametrize("compiling", [False, True])
def test_what_goes_to_a_gpu_is_pinned(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is traced, where memory cannot be pinned."""
    order: list[Any] = []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: (order.append("pinned"), t)[1])
    whole = Tensor.to

    def to(t: Tensor, place: Any, non_blocking: bool = False) -> Tensor:
        if isinstance(place, torch.device):
            order.append((place.type, non_blocking))
            return t
        return whole(t, place)

    monkeypatch.setattr(Tensor, "to", to)

    class Like:
        device, dtype = torch.device("cuda"), torch.float32

    like: Any = Like()
    assert constant(VALUES, like).tolist() == torch.tensor(VALUES).tolist()
    assert order == [*(() if compiling else ("pinned",)), ("cuda", True)]
