"""Lower precision where it is safe: matrix products and convolutions, nothing else.

Under autocast the products inside a loss run in bfloat16 or float16. What a denoiser does around
its network (c_skip x + c_out F), noising, losses, weights, optimisers and averages are
element-wise and stay in float32. float16 gradients would vanish or overflow, so that the loss of
each net is multiplied by a `Scale` of its own, and its gradient divided by it.

Weights are float32, and those of products rounded in each call. Weights that are never trained can
be held as what they are rounded to (`store_in_bf16`): half the memory, and the same answers to the
bit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.nets.lora import LAYERS

Precision = Literal["fp32", "bf16", "fp16"]
Held = Literal["fp32", "bf16"]


def autocast_products(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a loss is computed: torch.autocast, or none for "fp32"."""
    if precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(_caster(device), dtype)


def _caster(device: torch.device) -> str:
    """The device type whose autocast applies; the CPU's for "meta", where it does nothing."""
    return "cpu" if device.type == "meta" else device.type


def store_in_bf16(net: nn.Module) -> None:
    """Store the weights of linear layers and convolutions of `net` in bfloat16, in place.

    Under autocast to bfloat16 it answers as before, to the bit; outside of it, as a network of
    float32 whose weights were rounded. Biases, normalisations, embeddings and all other parameters
    stay as they are. ValueError as of `product_layers`.
    """
    for layer in product_layers(net):
        layer.weight.data = layer.weight.data.to(torch.bfloat16)
        layer.forward = partial(_held, layer)


def product_layers(net: nn.Module) -> list[Any]:
    """The layers whose weights `store_in_bf16` changes; ValueError where there are none."""
    layers = [m for m in net.modules() if isinstance(m, LAYERS) and m.weight is not None]
    if not layers:
        raise ValueError(
            f"{type(net).__name__} has no linear layers or convolutions whose weights could be "
            "held in bf16; leave --frozen out"
        )
    return layers


def _held(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's answer in the precision of its surroundings, not of its weights."""
    if torch.is_autocast_enabled(_caster(x.device)):
        answer: Tensor = type(layer).forward(layer, x.to(torch.bfloat16))
        return answer
    tensors = chain(layer.named_parameters(recurse=False), layer.named_buffers(recurse=False))
    others = {name: t.to(x.dtype) for name, t in tensors if t.dtype != x.dtype}
    out: Tensor = functional_call(layer, others, (x,)) if others else type(layer).forward(layer, x)
    return out


@dataclass
class Scale:
    """The loss scale of one net: halved at an overflow, doubled after `PATIENCE` updates
    without any (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).
    """

    value: float = 2.0**16
    clean: int = 0
    """Updates since it last changed."""

    def absorbs(self, finite: bool) -> bool:
        """Update the scale after a gradient that was finite, or not.

        Returns whether it was not finite and a smaller scale may help.
        """
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
