"""Convolutions on CUDA: how weights lie in memory, and who chooses the algorithm.

Tensor cores multiply what lies channel by channel at each pixel. In bfloat16 and float16 cuDNN
brings other pictures and weights into that order in each call; weights that lie so from the start
(torch's `channels_last`) make the activations follow. Shapes, names and stored files are the same,
sums are taken in another order. In float32, where products are not taken by tensor cores, weights
stay as they are.

A run calls its convolutions with few shapes, so that cuDNN may try its algorithms once for each
and keep the fastest. Which one that is depends on the machine's mood, and so do roundings.
"""

from __future__ import annotations

import torch
from torch import nn

from fewstep.nets.edm_layers import Conv2d
from fewstep.training.precision import Precision

DEVICES = frozenset({"cuda"})
"""Kinds of devices that this is for."""


def prepare_convolutions(net: nn.Module, device: torch.device, precision: Precision) -> None:
    """Change `net` in place, and torch's settings, if it is to be trained on a CUDA device."""
    if device.type not in DEVICES:
        return
    torch.backends.cudnn.benchmark = True
    if precision == "fp32":
        return
    for layer in net.modules():
        weight = layer._parameters.get("weight")
        if isinstance(layer, (nn.Conv2d, Conv2d)) and weight is not None:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
