"""Adam and AdamW in one pass over the numbers, without a first moment where beta_1 = 0.

With g the gradient, t the number of updates of a weight, and both moments zero at the start,

    m <- beta_1 m + (1 - beta_1) g,    v <- beta_2 v + (1 - beta_2) g^2,
    theta <- (1 - lr wd) theta - lr (m / (1 - beta_1^t)) / ((v / (1 - beta_2^t))^(1/2) + eps)

(Kingma & Ba 2014, https://arxiv.org/abs/1412.6980, algorithm 1; decay wd by Loshchilov & Hutter
2017, https://arxiv.org/abs/1711.05101, algorithm 2). Where beta_1 = 0, m is the gradient itself
and is not kept: four bytes a weight less, in memory and in checkpoints.

torch's fused kernel reads and writes each number once, and makes no temporary tensors. It goes
through memory in its order, so that tensors which lie there in different orders are updated by the
same formula in single operations. Both agree to rounding; a run that is resumed takes the same
one, and gives the same bits. torch's own classes import its compiler at their first call, which
takes seconds; this one does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.training.distributed import local_tensor

FUSED = frozenset({"cpu", "cuda", "meta", "mps", "xpu"})
"""Kinds of devices that have the kernel, or need none."""
Stock = torch.optim.Optimizer


class _Row(NamedTuple):
    """The tensors of the update of one parameter, this rank's parts.

    first: the gradient where no first moment is kept.
    """

    p: Tensor
    grad: Tensor
    first: Tensor
    second: Tensor
    step: Tensor


class Adam(Stock):
    """AdamW; Adam where there is no weight decay.

    Of each parameter the state is the count of updates ("step"), the second moment ("exp_avg_sq")
    and, unless beta_1 = 0, the first ("exp_avg").
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    add_param_group = inspect.unwrap(Stock.add_param_group)  # what is around it imports a compiler
    state_dict = inspect.unwrap(Stock.state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not called."""
        for group in self.param_groups:
            kinds: dict[tuple[torch.device, torch.dtype], list[_Row]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                row = self._row(p, self.state[p] or self._start(p, group))
                if _in_one_order(row):
                    kinds.setdefault((row.p.device, row.p.dtype), []).append(row)
                else:
                    _update(row, group)
            for rows in kinds.values():
                _update_fused(rows, group)

    def _start(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter that was never updated."""
        state: dict[str, Tensor] = self.state[p]
        state["step"] = torch.zeros((), device=local_tensor(p).device)
        if group["betas"][0]:
            state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg_sq"] = torch.zeros_like(p)
        return state

    def _row(self, p: Tensor, state: dict[str, Tensor]) -> _Row:
        assert p.grad is not None
        own = local_tensor(p)
        grad = _as(own, local_tensor(p.grad))
        first = local_tensor(state["exp_avg"]) if "exp_avg" in state else grad
        return _Row(own, grad, first, local_tensor(state["exp_avg_sq"]), state["step"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, of torch's own Adam too, whose first moment may be left.

        ValueError where a moment is missing.
        """
        places = [(p, group) for group in self.param_groups for p in group["params"]]
        for index, entry in state_dict["state"].items():
            p, group = places[index]
            for name, mine in self._start(p, group).items():
                if name not in entry:
                    raise ValueError(f"the state of an optimiser lacks {name!r} of weight {index}")
                local_tensor(mine).copy_(local_tensor(entry[name]))


def _as(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient with strides of `p`, where only those of dimensions of size 1 are others."""
    sides = zip(p.shape, p.stride(), grad.stride(), strict=True)
    if grad.stride() == p.stride() or any(n != 1 and a != b for n, a, b in sides):
        return grad
    return grad.as_strided(p.shape, p.stride())


def _in_one_order(row: _Row) -> bool:
    """Whether the kernel may go through the tensors: in memory without gaps, in the same order."""
    p, strides = row.p, row.p.stride()
    return (
        p.device.type in FUSED
        and p.is_floating_point()
        and all(t.stride() == strides and t.dtype == p.dtype for t in row[1:4])
        and (p.is_contiguous() or torch.empty_like(p, device="meta").stride() == strides)
    )


def _update_fused(rows: list[_Row], group: dict[str, Any]) -> None:
    """One update of parameters of one device and type."""
    parameters, grads, firsts, seconds, steps = map(list, zip(*rows, strict=True))
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        *(parameters, grads, firsts, seconds, [], steps),
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def _update(row: _Row, group: dict[str, Any]) -> None:
    """The same of one parameter, operation by operation."""
    beta1, beta2 = group["betas"]
    row.step.add_(1)
    t = int(row.step)
    if beta1:
        row.first.lerp_(row.grad, 1 - beta1)
    row.second.mul_(beta2).addcmul_(row.grad, row.grad, value=1 - beta2)
    size = (row.second / (1 - beta2**t)).sqrt_().add_(group["eps"])
    row.p.mul_(1 - group["lr"] * group["weight_decay"])
    row.p.addcdiv_(row.first, size, value=-group["lr"] / (1 - beta1**t))
