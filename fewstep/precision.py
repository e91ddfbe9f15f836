"""Lower precision where it is safe: matrix products and convolutions, nothing else.

Under autocast the products inside a loss run in bfloat16 or float16. What a denoiser does around
its network (c_skip x + c_out F), noising, losses, weights, optimisers and averages are
element-wise and stay in float32. float16 gradients would vanish or overflow, so that the loss of
each net is multiplied by a `Scale` of its own, and its gradient divided by it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]


def lowered(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """The context a loss is computed in."""
    if precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype)


@dataclass
class Scale:
    """What one net's loss is multiplied by: halved at an overflow, doubled after `PATIENCE`
    updates without any (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740)."""

    value: float = 2.0**16
    clean: int = 0
    """Updates since it last changed."""

    def absorbs(self, finite: bool) -> bool:
        """Learn whether a gradient was finite; whether a smaller scale may mend it if not."""
        if finite:
            self.clean += 1
            if self.clean >= PATIENCE:
                self.value, self.clean = 2 * self.value, 0
            return False
        room = self.value > 1
        self.value, self.clean = max(1.0, self.value / 2), 0
        return room


PATIENCE = 2000
"""Clean updates after which a scale is doubled."""
