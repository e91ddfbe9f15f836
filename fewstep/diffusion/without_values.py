"""Networks of tensors without values, on torch's device "meta": shapes and types alone.

So the size of a network is known before memory is taken for it, and one that is filled from a file
afterwards is not filled twice. On that device torch draws random numbers, and multiplies, in
Python, by code that imports its compiler and sympy: a second of every command that opens a model,
for numbers that nobody sees. They are not drawn here; a network's constructor scales them in
place, and of other constants leaves long ones without values and computes short ones on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

MADE = {torch.rand, torch.randn}
"""What makes a tensor of random numbers."""
FILLED: set[Callable[..., Any]] = {
    *(torch.Tensor.normal_, torch.Tensor.uniform_),
    *(init.normal_, init.uniform_),
}
"""What fills a tensor with them."""


class _Undrawn(TorchFunctionMode):
    """Leaves tensors as they are, in place of drawing their values."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func in MADE:
            options.pop("generator", None)
            return torch.empty(*args, **options)
        if func in FILLED:
            return args[0] if args else options["tensor"]
        return func(*args, **options)


@contextmanager
def without_values() -> Iterator[None]:
    """Within the block new tensors are on the device "meta", and no random numbers are drawn."""
    with torch.device("meta"), _Undrawn():
        yield
