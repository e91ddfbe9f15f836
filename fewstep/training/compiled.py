"""Calls of networks by code that torch.compile makes of them.

A turn calls student, fake score and teacher in few ways: trained or frozen, with a graph or
without, on one size of batch. Each way of each network is compiled at its first call and kept, so
that later turns compile nothing. A network stays the module that it was: `forward` alone is
replaced, on the instance, so that names, checkpoints and averages notice nothing.

What a compiler would miss is called as ever: under `torch.func` (forward-mode derivatives), under
a mode that watches operations (`fewstep.plan`), while the network is traced for an export, and
while hooks hang on its inner modules that were not there before, as when a discriminator reads
layers. So are other methods of a network than its call, such as `encode`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from fewstep.diffusion.extra_inputs import ExtraInputs
from fewstep.diffusion.heads import Heads
from fewstep.nets.experts import ExpertsNet
from fewstep.nets.lora import as_plain
from fewstep.nets.routed import RoutedNet

BACKEND = "inductor"
"""Of torch.compile."""
CHANGING = {
    ExtraInputs: "further inputs",
    Heads: "several heads",
    RoutedNet: "students for different labels",
    ExpertsNet: "experts for different times",
}
"""Networks whose code depends on what they are called for."""


def compile_calls(net: nn.Module) -> None:
    """Change `net` in place: its calls are compiled, each at its first use.

    Copies of it are not compiled. ValueError for networks that do not do the same in each call:
    those with further inputs or several heads, which hooks tell them, and those that send samples
    to one of several networks.
    """
    for module in net.modules():
        for kind, what in CHANGING.items():
            if isinstance(module, kind):
                raise ValueError(
                    f"a network with {what} does not do the same in each call, as compiled code "
                    "does; leave out --compile"
                )
    as_plain(net)
    net.forward = CompiledCall(net)


class CompiledCall:
    """The `forward` of `net`, compiled where a compiler sees all of it."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.inner = net, [m for m in net.modules() if m is not net]
        self.hooks = self._hooks()
        self.fast: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **named: Any) -> Any:
        """What the network's class would answer.

        ValueError where torch cannot compile it on this machine.
        """
        if _watched() or self._hooks() != self.hooks:
            return type(self.net).forward(self.net, *args, **named)
        if self.fast is None:
            self.fast = torch.compile(_own(type(self.net).forward), dynamic=False, backend=BACKEND)
        try:
            return self.fast(self.net, *args, **named)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            why = str(error).strip().partition("\n")[0]
            name = type(self.net).__name__
            raise ValueError(
                f"torch cannot compile {name} here, leave --compile out: {why}"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The ordinary `forward` of the copy of the network."""
        return MethodType(type(self.net).forward, deepcopy(self.net, memo))

    def _hooks(self) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.inner)


def _watched() -> bool:
    """Whether calls are transformed, watched or traced now."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def _own(function: Any) -> Any:
    """A copy of a function with code of its own: torch keeps what it compiled with the code.

    Networks of one class would share one place otherwise, which holds eight ways in all.
    """
    if not isinstance(function, FunctionType):
        return function
    code = function.__code__.replace()
    own = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own
