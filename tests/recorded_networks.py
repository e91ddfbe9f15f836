"""Recorded values of the official implementations: weights, inputs, outputs, gradients.

Those in tests/golden are of networks small enough to be committed. Recordings of larger ones, with
the same names and keys, are tried by setting FEWSTEP_GOLDEN to their folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from fewstep.nets.precond import Preconditioned
from fewstep.teachers import edm, edm2

GOLDEN = Path(os.environ.get("FEWSTEP_GOLDEN") or Path(__file__).parent / "golden")
NAMES = ("edm_ddpmpp", "edm_ncsnpp", "edm_adm", "edm2")


class Recorded(NamedTuple):
    """One file: constructor arguments, state dict, and every other tensor by name."""

    build: Callable[..., Preconditioned]
    kwargs: dict[str, Any]
    state: dict[str, Tensor]
    tensors: dict[str, Tensor]

    def net(self, **options: Any) -> Preconditioned:
        """The network, rebuilt."""
        return self.build(self.kwargs, self.state, **options)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(x, sigma, labels, augment_labels)."""
        t = self.tensors
        return t["x"], t["sigma"], t.get("labels"), t.get("augment_labels")


def recorded(name: str) -> Recorded:
    """The file tests/golden/<name>.safetensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        kwargs = json.loads(file.metadata()["kwargs"])
    state = {
        key.removeprefix("state/"): tensors.pop(key)
        for key in list(tensors)
        if key.startswith("state/")
    }
    return Recorded(edm2.build if name == "edm2" else edm.build, kwargs, state, tensors)
