"""Activations that are computed again when a gradient needs them: less memory, more time.

`recompute(net)` keeps of every block its input alone. The backward pass calls the block once
more, with torch's generators as they were, and has the same bits (Chen et al. 2016,
https://arxiv.org/abs/1604.06174). A block's hooks stay outside, so that an encoder tap
(`fewstep.tap`) and parts of weights (`fewstep.sharding`) work as before. Without gradients
nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_now = {"again": False}
"""Not of a thread: on an accelerator, the backward pass has threads of its own."""


def again() -> bool:
    """Whether what is called now is a repetition, which must leave its module as it is."""
    return _now["again"]


def recompute(net: nn.Module) -> None:
    """Change `net` in place: the entries of its outermost lists of blocks are computed again.

    Networks of diffusers do it by themselves, in finer parts. ValueError where there are neither
    lists nor such networks, so that nothing would be saved.
    """
    if not has_blocks(net):
        raise ValueError(
            f"{type(net).__name__} has no list of blocks (nn.ModuleList or nn.ModuleDict) whose "
            "activations could be computed again; leave --recompute out"
        )
    for block in _blocks(net):
        own = getattr(block, "enable_gradient_checkpointing", None)
        if own is not None:
            own(_lean)
        elif "forward" not in vars(block):
            block.forward = partial(_lean, block.forward)


def has_blocks(net: object) -> bool:
    """Whether there is anything in `net` that `recompute` can change."""
    return isinstance(net, nn.Module) and any(True for _ in _blocks(net))


def _blocks(net: nn.Module) -> Iterator[nn.Module]:
    if hasattr(net, "enable_gradient_checkpointing"):
        yield net
        return
    for child in net.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from child.children()
        else:
            yield from _blocks(child)


def _lean(call: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """call(*args, **named), of which the arguments alone are kept for the backward pass."""
    if not torch.is_grad_enabled():
        return call(*args, **named)
    return checkpoint(call, *args, use_reentrant=False, context_fn=_contexts, **named)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds the first call, and what its repetition."""
    return nullcontext(), _repeating()


@contextmanager
def _repeating() -> Iterator[None]:
    before, _now["again"] = _now["again"], True
    try:
        yield
    finally:
        _now["again"] = before
