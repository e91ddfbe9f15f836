"""A network of diffusers as configuration: its class, and its own configuration as JSON.

A student is rebuilt from these alone, so its folder needs nothing of the teacher's.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from fewstep.diffusion.model import Net
from fewstep.teachers.diffusers.adapter_base import Adapter
from fewstep.teachers.diffusers.adapters import ADAPTERS


def require_library(name: str) -> ModuleType:
    """diffusers or transformers; a ValueError says how to get it."""
    import importlib

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which they import where it is
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"pipelines need {name}, which is not installed: pip install 'fewstep[t2i]'"
        ) from None
    module.utils.logging.disable_progress_bar()
    module.utils.logging.set_verbosity_error()
    return module


EXTRA = dict.fromkeys(
    (
        *("FluxTransformer2DModel", "Flux2Transformer2DModel"),
        *("QwenImageTransformer2DModel", "ZImageTransformer2DModel"),
    ),
    ("sample_size",),
)
"""Keys of a configuration beside the constructor's: these are of any size, told here."""


@dataclass(frozen=True)
class DiffusersNet(Net):
    """A network by the name of its class in diffusers."""

    class_name: str
    """Name of its class in diffusers, one of `fewstep.teachers.diffusers.adapters.ADAPTERS`."""
    config: str
    """The arguments of its constructor, and its sample_size, a JSON object."""
    tokens: int
    """Length of a prompt's embedding, in tokens."""
    pixels: int
    """Height of the decoded picture at the sample size that the configuration names."""

    def build(self, shape: tuple[int, ...], classes: int) -> Adapter:
        """F(x, label, cond) with newly drawn weights, in evaluation mode."""
        if classes:
            raise ValueError(f"a {self.class_name} takes prompts, got Model.classes {classes}")
        net = self.network()
        self.fits(shape, net.config)  # type: ignore[arg-type]
        return ADAPTERS[self.class_name](net, self.tokens, shape, self.scale).eval()

    @property
    def scale(self) -> int:
        """Pixels along a side of one position of a sample."""
        cls = getattr(require_library("diffusers"), self.class_name)
        known = inspect.signature(cls.__init__).parameters.items()
        defaults = {key: p.default for key, p in known if p.default is not p.empty}
        return self.pixels // ADAPTERS[self.class_name].shape({**defaults, **self.arguments()})[1]

    def fits(self, shape: tuple[int, ...], completed: Mapping[str, Any] | None = None) -> None:
        """Raise ValueError where the network takes no samples of `shape` (C, H, W)."""
        try:
            ADAPTERS[self.class_name].fits({**(completed or {}), **self.arguments()}, shape)
        except ValueError as error:
            raise ValueError(f"{self.class_name}: {error}") from None

    def network(self) -> nn.Module:
        """The network itself; a ValueError says what is not known of its configuration."""
        if self.class_name not in ADAPTERS:
            raise ValueError(
                f"the class {self.class_name} is not known; fewstep builds {', '.join(ADAPTERS)}"
            )
        cls = getattr(require_library("diffusers"), self.class_name)
        known = set(inspect.signature(cls.__init__).parameters) - {"self"}
        given = {key: value for key, value in self.arguments().items() if value is not None}
        config = {key: value for key, value in self.arguments().items() if key in known}
        strange = sorted(given.keys() - known - set(EXTRA.get(self.class_name, ())))
        if strange:
            raise ValueError(f"{self.class_name} has no argument {strange[0]!r}")
        ADAPTERS[self.class_name].suits(config)
        try:
            net: nn.Module = cls.from_config(config)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{self.class_name} cannot be built so: {error}") from None
        return net

    def arguments(self) -> dict[str, Any]:
        """The configuration as a dictionary."""
        try:
            value = json.loads(self.config)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"DiffusersNet.config is a JSON object, got {self.config[:80]!r}")
        return value
