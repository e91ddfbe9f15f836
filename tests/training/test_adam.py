"""Adam against torch's own classes, which go by other kernels: equal to rounding.

Weights and updates are of order one, and rounded in a dozen updates: they are compared to eight
units of rounding.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.training import adam as module
from fewstep.training.adam import Adam

LR = 0.1
SHAPES = ((1,), (7,), (33, 5), (4, 3, 3, 3), ())
Make = Callable[[Tensor], Tensor]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1) if t.ndim > 1 else t


def channels_last(t: Tensor) -> Tensor:
    return t.to(memory_format=torch.channels_last) if t.ndim == 4 else t


def spaced(t: Tensor) -> Tensor:
    """With gaps between its numbers in memory."""
    return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]


def weights(make: Make = torch.clone, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(make(torch.randn(s, generator=generator).to(dtype))) for s in SHAPES]


def gradients(parameters: Sequence[Tensor], step: int) -> None:
    """The gradient of step `step`; the second weight has none in every third step."""
    generator = torch.Generator().manual_seed(100 + step)
    for index, p in enumerate(parameters):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 10.0 ** (index - 2)
        p.grad = None if index == 1 and step % 3 == 1 else torch.empty_like(p)
        if p.grad is not None:
            p.grad.copy_(grad)


def run(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], steps: range
) -> list[Tensor]:
    for step in steps:
        optimizer.param_groups[0]["lr"] = LR / (1 + step)
        gradients(parameters, step)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def stock(parameters: Sequence[Any], beta: float, decay: float) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    return kind(parameters, LR, (beta, 0.99), 1e-8, weight_decay=decay, fused=False)


def ours(parameters: Sequence[Any], beta: float, decay: float = 0.0) -> Adam:
    return Adam(parameters, LR, (beta, 0.99), 1e-8, decay)


def close(some: Sequence[Tensor], others: Sequence[Tensor], dtype: torch.dtype) -> bool:
    error = max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))
    return error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [torch.clone, channels_last, transposed, spaced])
def test_it_is_adam(beta: float, decay: float, dtype: torch.dtype, make: Make) -> None:
    """Twelve updates at changing rates, of weights that lie in memory in every order."""
    mine, theirs = weights(make, dtype), weights(make, dtype)
    found = run(ours(mine, beta, decay), mine, range(12))
    expected = run(stock(theirs, beta, decay), theirs, range(12))
    assert close(found, expected, dtype)
    assert not close(found, run(stock(theirs, beta, decay), theirs, range(12)), dtype)


def test_the_kernel_is_kept_from_other_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would go through weights and gradients in memory's order and mix up their numbers."""
    ends = []
    for order in (module._in_one_order, lambda row: True):
        monkeypatch.setattr(module, "_in_one_order", order)
        p = nn.Parameter(torch.zeros(2, 3).t())
        p.grad = torch.arange(6.0).reshape(3, 2)
        Adam([p], LR, (0.0, 0.0), 1.0).step()
        ends.append(p.detach().clone())
    right = -LR * torch.arange(6.0).reshape(3, 2) / (1 + torch.arange(6.0).reshape(3, 2))
    torch.testing.assert_close(ends[0], right)
    assert not torch.allclose(ends[1], right)


def test_types_and_gradients_may_be_mixed() -> None:
    pair = [nn.Parameter(torch.zeros(3, dtype=t)) for t in (torch.float32, torch.float64)]
    idle = nn.Parameter(torch.ones(2))
    optimizer = Adam([*pair, idle], LR, (0.0, 0.0), 1.0)
    for p in pair:
        p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    for p in pair:
        torch.testing.assert_close(p.detach(), torch.full_like(p, -LR * 3 / 4))
    assert torch.equal(idle, torch.ones(2))
    assert idle not in optimizer.state


@pytest.mark.parametrize(("beta", "kept"), [(0.0, False), (0.9, True)])
def test_a_first_moment_is_kept_where_there_is_one(beta: float, kept: bool) -> None:
    parameters = weights()
    optimizer = ours(parameters, beta)
    run(optimizer, parameters, range(2))
    names = {"step", "exp_avg_sq"} | ({"exp_avg"} if kept else set())
    assert all(set(entry) == names for entry in optimizer.state.values())
    assert [int(optimizer.state[p]["step"]) for p in parameters] == [2, 1, 2, 2, 2]


def halves(
    first: Callable[..., Any], beta: float, make: Make = torch.clone
) -> Iterator[list[Tensor]]:
    """Ten updates of ours, and five of `first` continued by five of ours."""
    whole, parts = weights(make), weights(make)
    yield run(ours(whole, beta), whole, range(10))
    before = first(parts, beta, 0.0)
    run(before, parts, range(5))
    after = ours(parts, beta)
    saved = before.state_dict()["state"].items()
    state = {i: {k: v.clone().contiguous() for k, v in e.items()} for i, e in saved}
    after.load_state_dict({"state": state, "param_groups": []})
    yield run(after, parts, range(5, 10))


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("make", [torch.clone, channels_last, transposed])
def test_a_continued_run_is_the_run(beta: float, make: Make) -> None:
    """To the bit, from moments that were stored in the plain order."""
    whole, continued = halves(ours, beta, make)
    assert all(map(torch.equal, whole, continued))


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_states_of_torch_are_continued(beta: float) -> None:
    """Checkpoints hold a first moment where beta_1 = 0 if torch's own class wrote them."""
    whole, continued = halves(stock, beta)
    assert close(whole, continued, torch.float32)


def test_a_state_without_its_moment_is_refused() -> None:
    parameters = weights()
    before, after = ours(parameters, 0.0), ours(parameters, 0.9)
    run(before, parameters, range(1))
    with pytest.raises(ValueError, match="lacks 'exp_avg' of weight 0"):
        after.load_state_dict(before.state_dict())


def test_no_compiler_is_imported() -> None:
    """torch's own classes import one as they are made; that is the control."""
    code = (
        "import sys, torch\n"
        "from fewstep.training.optim import Optim\n"
        "p = torch.nn.Parameter(torch.zeros(3))\n"
        "p.grad = torch.ones(3)\n"
        "optimizer = Optim().build([p])\n"
        "optimizer.step()\n"
        "optimizer.load_state_dict(optimizer.state_dict())\n"
        "print('torch._dynamo' in sys.modules)\n"
        "torch.optim.Adam([p])\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_sides_of_one_may_have_any_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gradients of 1x1 convolutions have; single operations would read the device each time."""
    ends = []
    monkeypatch.setattr(module, "_update", None)
    for strides in ((2, 1, 1, 1), (2, 1, 7, 3)):
        p = nn.Parameter(torch.arange(6.0).reshape(3, 2, 1, 1))
        optimizer = Adam([p], LR, (0.5, 0.9), 1e-8)
        p.grad = torch.arange(1.0, 7.0).as_strided((3, 2, 1, 1), strides)
        assert p.grad.stride() == strides
        optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)
    assert torch.allclose(ends[0].flatten(), torch.arange(6.0) - LR)
