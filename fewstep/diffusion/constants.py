"""Numbers that the host knows, brought to where the samples are, without waiting for the device.

A copy from ordinary memory to a GPU waits until all that was asked of it before is done: the host
cannot run ahead any more, and the device idles afterwards. A copy from pinned memory waits for
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """The numbers (N,) with dtype and device of `like`: `like.new_tensor(values)`."""
    if like.device.type == "cpu":
        return like.new_tensor(values)
    return beside(torch.tensor(values, dtype=like.dtype, device="cpu"), like)


def beside(host: Tensor, like: Tensor) -> Tensor:
    """A tensor in main memory with dtype and device of `like`: `host.to(like)`."""
    host, kind = host.to(like.dtype), like.device.type
    if kind == "cuda" and not torch.compiler.is_compiling():
        host = host.pin_memory()
    return host.to(like.device, non_blocking=kind in ("cuda", "meta"))
