"""What every network of diffusers is here: F(x, label, cond), with an encoder tap.

`cond` is a mapping of tensors, such as {"prompt": (B, L, D)}, and None is the null prompt: the
network holds its embedding as buffers, which is what classifier-free guidance calls upon.

The features of the tap are, in a U-Net, what its last down block hands to the middle block; in a
transformer, the tokens half way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.diffusion.types import Cond


class _Heard(Exception):
    """The features are there; the rest of the network is not needed."""


class Adapter(nn.Module, ABC):
    """A diffusers network for samples (C, H, W), and the null prompt of `tokens` words."""

    flow: ClassVar[bool] = True
    """Whether such networks are trained on a flow, or on betas."""
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Keys of the configuration that ask for inputs or layers of another kind -> the values that
    do not."""
    learned_variance: ClassVar[bool] = False
    """Whether the network may answer with twice the channels, the second half of no use here."""

    def __init__(self, net: nn.Module, tokens: int, pixels: int) -> None:
        super().__init__()
        self.net = net
        self.pixels = pixels
        for name, shape in self.shapes(tokens).items():
            self.register_buffer(f"null_{name}", torch.zeros(shape))

    @property
    def config(self) -> Any:
        """The network's configuration."""
        return self.net.config

    @staticmethod
    def shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Shape of a sample for a network of this configuration; ValueError where it says none."""
        channels, size = config.get("in_channels"), config.get("sample_size")
        if not isinstance(size, int) or not isinstance(channels, int):
            raise ValueError("the configuration says no square sample_size and in_channels")
        return channels, size, size

    @classmethod
    def suits(cls, config: Mapping[str, Any]) -> None:
        """A ValueError where such a network would be called with more than is known here.

        config: may leave out keys that have their defaults.
        """
        for key, values in cls.only.items():
            if config.get(key, values[0]) not in values:
                raise ValueError(
                    f"{key} is {config[key]!r}, but networks are called as those of {key} "
                    f"{' or '.join(map(repr, values))}; this one needs inputs that fewstep does "
                    "not give"
                )

    @staticmethod
    def channels(config: Mapping[str, Any]) -> int:
        """Channels of the network's answer, counted as those of a sample are."""
        out = config.get("out_channels")
        return int(config["in_channels"] if out is None else out)

    @staticmethod
    def patch(config: Mapping[str, Any]) -> int:
        """Side of the square of a sample that is one token; 1 in a U-Net."""
        return int(config.get("patch_size") or 1)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """(F, h, w) of the features, (F,) where they are tokens."""
        return (self.config.num_attention_heads * self.config.attention_head_dim,)

    @abstractmethod
    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of a condition, without the batch."""

    @abstractmethod
    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """What the network is called with, by name, beside x."""

    @abstractmethod
    def middle(self) -> nn.Module:
        """The module whose input the tap hands out."""

    def laid_out(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) in the layout that the network, and its stock pipeline, has for it."""
        return x

    def put_back(self, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `laid_out`; shape: (..., H, W)."""
        return out

    @property
    def call(self) -> dict[str, float]:
        """What the stock pipeline of a student is called with, so that it does no more itself."""
        return {"guidance_scale": 0.0}

    def null(self) -> dict[str, Tensor]:
        """The null prompt: tensors of `shapes`."""
        return {name[5:]: b for name, b in self.named_buffers() if name.startswith("null_")}

    def set_null(self, cond: Mapping[str, Tensor]) -> None:
        """Take over the null prompt; cond: (1, *) tensors."""
        told = self.conditions(next(iter(cond.values())), cond)
        for name, buffer in self.null().items():
            buffer.copy_(told[name][0])

    def conditions(self, x: Tensor, cond: Cond) -> dict[str, Tensor]:
        """cond, or the null prompt, as tensors for the batch of x; a ValueError if it is not."""
        null = self.null()
        if cond is None:
            return {name: b.to(x.dtype).expand(x.shape[0], *b.shape) for name, b in null.items()}
        if not isinstance(cond, Mapping) or cond.keys() != null.keys():
            came = ", ".join(cond) if isinstance(cond, Mapping) else type(cond).__name__
            raise ValueError(f"a condition is a mapping of {', '.join(null)}; got {came}")
        for name, buffer in null.items():
            wanted = (x.shape[0], *buffer.shape)
            if cond[name].shape != wanted:
                raise ValueError(
                    f"cond[{name!r}] has shape {tuple(cond[name].shape)}, expected {wanted}"
                )
        return {name: cond[name].to(x) for name in null}

    def forward(self, x: Tensor, label: Tensor, cond: Cond = None) -> Tensor:
        told = self.arguments(x, label, self.conditions(x, cond))
        out: Tensor = self.net(self.laid_out(x), **told, return_dict=False)[0]
        out = self.put_back(out, x.shape)
        # half of the channels is a learned variance, which diffusers' samplers drop too
        return out.chunk(2, 1)[0] if out.shape[1] == 2 * x.shape[1] else out

    def encode(self, x: Tensor, label: Tensor, cond: Cond = None) -> Tensor:
        """The features alone; what comes after them is not computed."""
        found: list[Tensor] = []

        def stop(features: Tensor) -> None:
            found.append(features)
            raise _Heard

        with self._tap(stop), suppress(_Heard):
            self(x, label, cond)
        return found[0]

    def forward_with_features(
        self, x: Tensor, label: Tensor, cond: Cond = None
    ) -> tuple[Tensor, Tensor]:
        """(F(x, label, cond), features) from one pass."""
        found: list[Tensor] = []
        with self._tap(found.append):
            out = self(x, label, cond)
        return out, found[0]

    @contextmanager
    def _tap(self, hear: Callable[[Tensor], None]) -> Iterator[None]:
        """Within the block, `hear` gets what `middle` is called with, channels first."""

        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            features: Tensor = args[0] if args else named["hidden_states"]
            hear(features.transpose(1, 2) if features.ndim == 3 else features)

        handle = self.middle().register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
