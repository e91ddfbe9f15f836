"""Activation checkpointing: recompute activations in the backward pass, for less memory.

`recompute(net)` keeps of every block its input alone. The backward pass calls the block once
more, with torch's generators as they were, if the block drew from them, and has the same bits
(Chen et al. 2016, https://arxiv.org/abs/1604.06174). A block's hooks stay outside, so that
encoder features (`fewstep.diffusion.encoder_features`) and sharding
(`fewstep.training.sharding`) work as before. Without gradients nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_now = {"again": False}
"""Not of a thread: on an accelerator, the backward pass has threads of its own."""


def again() -> bool:
    """Whether a block is being recomputed now, and must leave its module as it is."""
    return _now["again"]


def recompute(net: nn.Module) -> None:
    """Change `net` in place: the entries of its outermost lists of blocks are recomputed.

    Networks of diffusers do it by themselves, in finer pieces. ValueError where there are neither
    lists nor such networks, so that nothing would be saved.
    """
    if not has_blocks(net):
        raise ValueError(
            f"{type(net).__name__} has no list of blocks (nn.ModuleList or nn.ModuleDict) whose "
            "activations could be computed again; leave --recompute out"
        )
    for block in _blocks(net):
        enable = getattr(block, "enable_gradient_checkpointing", None)
        if enable is not None:
            enable(_lean)
        elif "forward" not in vars(block):
            block.forward = partial(_lean, block.forward)


def has_blocks(net: object) -> bool:
    """Whether `recompute` can change anything in `net`."""
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
    devices = {a.device for a in args if isinstance(a, Tensor)}
    draws = _Draws(sorted((d for d in devices if d.type == "cuda"), key=str))
    other = any(d.type not in ("cpu", "cuda", "meta") for d in devices)  # torch remembers those
    options: Any = {"use_reentrant": False, "preserve_rng_state": other, **named}
    return checkpoint(call, *args, context_fn=draws.contexts, **options)


class _Draws:
    """The state of torch's generators before a call that drew from them; else nothing is kept.

    devices: accelerators that have a generator of their own.
    """

    def __init__(self, devices: list[torch.device]) -> None:
        self.devices = devices
        self.before: list[Tensor] = []

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What surrounds the first call, and what its repetition."""
        return self._first(), self._again()

    def _states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]

    @contextmanager
    def _first(self) -> Iterator[None]:
        before = self._states()
        yield
        if not all(map(torch.equal, before, self._states())):
            self.before = before

    @contextmanager
    def _again(self) -> Iterator[None]:
        outer, _now["again"] = _now["again"], True
        try:
            with torch.random.fork_rng(self.devices, enabled=bool(self.before)):
                if self.before:
                    torch.set_rng_state(self.before[0])
                for device, state in zip(self.devices, self.before[1:], strict=False):
                    torch.cuda.set_rng_state(state, device)
                yield
        finally:
            _now["again"] = outer
