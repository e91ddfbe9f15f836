"""What makes a program wait for its accelerator, seen on a machine without one.

The device "meta" stands in. A host waits where it reads a number of the device (`item`, `tolist`,
`bool`, ...), where a shape depends on one (`nonzero`), and where it copies memory that is not
pinned to the device, as `new_tensor` of a list does.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fewstep

PACKAGE = str(Path(fewstep.__file__).parent)
READS = {
    *(Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy),
    *(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__),
    *(Tensor.nonzero, torch.nonzero, Tensor.masked_select, torch.masked_select, Tensor.unique),
}
MAKES = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
MOVES = {Tensor.to, Tensor.copy_, Tensor.type_as}


class Waits(TorchFunctionMode):
    """Within the block `places` gets where each wait is: "room/file.py function"."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READS and on_device(args[0]):
            self._note()
        out = func(*args, **kwargs)
        if func in MAKES and on_device(out) and not (args and on_device(args[-1])):
            self._note()
        elif func in MOVES and on_device(out) and not kwargs.get("non_blocking"):
            source = args[1] if func is Tensor.copy_ else args[0]
            if not on_device(source):
                self._note()
        return out

    def _note(self) -> None:
        frames = [f for f in traceback.extract_stack() if "/fewstep/" in f.filename]
        last = frames[-1]
        self.places.append(
            f"{Path(last.filename).parent.name}/{Path(last.filename).name} {last.name}"
        )


def on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta
