"""Adam with 8-bit moments: two bytes a weight where Adam keeps eight.

Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization,
https://arxiv.org/abs/2110.02861. Of each moment, a block of 256 neighbouring weights keeps its
largest absolute value N in float32, and of every weight the number i of the nearest code q_i,

    m = N q_i,    q = +- 10^-e f,    e = 0, ..., 6,

with 2^(6-e) fractions f for the first moment, the middles of as many equal parts of [0.1, 1], and
twice as many for the second, which has no sign; 0 and 1 are codes too. So what is near N is known
to 0.7 % of N and 0.35 %, and what is much smaller to a part of itself. An update turns both
moments into float32, is Adam's, and quantises them again. Tensors of less than 4096 numbers, such
as biases and normalisations, keep moments of 32 bits.

The arithmetic is that of bitsandbytes, the extra `lowmem`, imported only where it is needed. On
a CPU it looks codes up in a table of 2^16 cells, so that they are the nearest to 3e-5 N.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 256
"""Neighbouring weights that share a largest absolute value: the library's only choice."""
SMALLEST = 4096
"""Numbers of the smallest tensor whose moments are quantised."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Adam8(torch.optim.Optimizer):
    """AdamW with 8-bit moments; Adam where there is no weight decay.

    All of its state is tensors, which a checkpoint holds: the count of updates and both moments
    under Adam's names, and of quantised ones the largest absolute values of the blocks.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        """ValueError where bitsandbytes is not installed."""
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, settings)
        self.library = library()
        self.codes = [self.library.create_dynamic_map(signed) for signed in (True, False)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not called."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, self.state[p] or self._start(p), group)

    def _start(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter that was never updated."""
        state = self.state[p]
        state["step"] = torch.zeros(())
        small = p.numel() < SMALLEST
        for name in MOMENTS:
            dtype = torch.float32 if small else torch.uint8
            state[name] = torch.zeros(p.shape, dtype=dtype, device=p.device)
            if not small:
                state[f"{name}_max"] = p.new_zeros(-(-p.numel() // BLOCK))
        out: dict[str, Tensor] = state
        return out

    def _update(self, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        p.data = p.data.contiguous()  # the library goes through memory in its order
        grad, (first, second) = p.grad, (state[name] for name in MOMENTS)
        assert grad is not None
        options = {"weight_decay": group["weight_decay"]}
        if first.dtype != torch.uint8:
            self.library.optimizer_update_32bit(
                *("adam", grad.contiguous(), p, first, beta1, group["eps"], step, group["lr"]),
                *(second, beta2),
                **options,
            )
            return
        self.codes = [code.to(p.device) for code in self.codes]
        self.library.optimizer_update_8bit_blockwise(
            *("adam", grad.contiguous(), p, first, second, beta1, beta2, 0.0, 0.0),
            *(group["eps"], step, group["lr"], *self.codes),
            *(state[f"{name}_max"] for name in MOMENTS),
            **options,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load `state_dict` and keep its types; torch's own method would convert to floats."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, entry in state_dict["state"].items():
            p = parameters[index]
            self.state[p] = {k: t.to(p.device) if t.ndim else t for k, t in entry.items()}


def refuse_missing() -> None:
    """ValueError that says how to install bitsandbytes, where it is missing; imports nothing."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "8-bit moments need bitsandbytes, which is not installed: "
            "pip install 'fewstep[lowmem]'"
        )


def library() -> ModuleType:
    """The module bitsandbytes.functional, whose import takes seconds."""
    refuse_missing()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels of no use here
    return importlib.import_module("bitsandbytes.functional")
