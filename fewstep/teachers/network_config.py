"""Networks of EDM and EDM2 as configuration: the published class and constructor arguments.

A converted snapshot (`fewstep.teachers.snapshots`) is rebuilt from these two alone. Such a network
is a whole denoiser with its own preconditioning, so its `Model` predicts "denoiser".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from fewstep.diffusion.model import Model, Net
from fewstep.diffusion.without_values import without_values
from fewstep.nets.precond import Preconditioned
from fewstep.teachers import edm, edm2

CLASSES = (*edm.CLASSES, "Precond")
"""The published class names; Precond is EDM2's."""


@dataclass(frozen=True)
class SnapshotNet(Net):
    """A network by its published class name and its constructor arguments as JSON text."""

    class_name: str
    """Published name of its class, such as EDMPrecond; Precond is EDM2's."""
    arguments: str
    """Arguments of its constructor, a JSON object."""

    def build(self, shape: tuple[int, ...], classes: int) -> Preconditioned:
        """The denoiser with newly drawn weights, in evaluation mode."""
        net, arguments = self.network(), self.kwargs()
        size = (
            arguments["img_channels"],
            arguments["img_resolution"],
            arguments["img_resolution"],
        )
        if (shape, classes) != (size, net.label_dim):
            raise ValueError(
                f"{self.class_name} of these arguments is for {size} with {net.label_dim} "
                f"classes, got Model.shape {shape} with {classes}"
            )
        return net.eval()

    def kwargs(self) -> dict[str, Any]:
        """The constructor arguments; ValueError where they are no JSON object."""
        try:
            value = json.loads(self.arguments)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ValueError(
                f"SnapshotNet.arguments is a JSON object, got {self.arguments[:80]!r}"
            )
        return value

    def network(self) -> Preconditioned:
        """The network that class name and arguments say; ValueError where they do not fit."""
        if self.class_name not in CLASSES:
            raise ValueError(
                f"the class {self.class_name} is not known; fewstep builds {', '.join(CLASSES)}"
            )
        if self.class_name == "Precond":
            return edm2.new_network(self.kwargs())
        return edm.new_network(self.kwargs(), self.class_name)


def describe(class_name: str, init_kwargs: Mapping[str, Any]) -> tuple[Model, Preconditioned]:
    """The `Model` of a published class and its arguments, and its network without weights."""
    config = SnapshotNet(class_name, json.dumps(dict(init_kwargs)))
    with without_values():
        net = config.network()
    size = init_kwargs["img_resolution"]
    shape = (init_kwargs["img_channels"], size, size)
    sigma_data = float(getattr(net, "sigma_data", 0.5))
    return Model(config, shape, net.label_dim, net.path, "denoiser", sigma_data), net


def published_model(class_name: str, init_kwargs: Mapping[str, Any]) -> Model:
    """The `Model` alone; recipes of one network, of which there are many, build it once."""
    return _published(class_name, json.dumps(dict(init_kwargs)))


@cache
def _published(class_name: str, arguments: str) -> Model:
    return describe(class_name, json.loads(arguments))[0]
