"""The base of all networks of diffusers: F(x, label, cond), with encoder features.

`cond` is a mapping of tensors, such as {"prompt": (B, L, D)}, and None is the null prompt: the
network holds its embedding as buffers, which classifier-free guidance uses.

The features are, in a U-Net, what its last down block passes to the middle block; in a
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
    """Stops a forward pass once the features are there."""


class Adapter(nn.Module, ABC):
    """A diffusers network for samples (C, H, W), with the null prompt of `tokens` tokens."""

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
        """Raise ValueError for a configuration whose network needs inputs that are not given here.

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
        """Channels of the network's output, counted as those of a sample are."""
        out = config.get("out_channels")
        return int(config["in_channels"] if out is None else out)

    @staticmethod
    def patch(config: Mapping[str, Any]) -> int:
        """Side of the square of a sample that is one token; 1 in a U-Net."""
        return int(config.get("patch_size") or 1)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """(F, h, w) of the encoder features; (F,) where they are tokens."""
        return (self.config.num_attention_heads * self.config.attention_head_dim,)

    @abstractmethod
    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of a condition, without the batch."""

    @abstractmethod
    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments that the network is called with, beside x.

        x: (B, C, H, W); label: (B,); cond: tensors of `shapes`, batched.
        """

    @abstractmethod
    def middle(self) -> nn.Module:
        """The module whose input is the encoder features."""

    def laid_out(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) in the layout that the network takes, and its stock pipeline."""
        return x

    def put_back(self, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `laid_out`; shape: (..., H, W)."""
        return out

    @property
    def call(self) -> dict[str, float]:
        """Arguments of the stock pipeline of a student, so that it adds no guidance of its own."""
        return {"guidance_scale": 0.0}

    def null(self) -> dict[str, Tensor]:
        """The null prompt: tensors of `shapes`."""
        return {name[5:]: b for name, b in self.named_buffers() if name.startswith("null_")}

    def set_null(self, cond: Mapping[str, Tensor]) -> None:
        """Set the null prompt; cond: (1, *) tensors."""
        conditions = self.conditions(next(iter(cond.values())), cond)
        for name, buffer in self.null().items():
            buffer.copy_(conditions[name][0])

    def conditions(self, x: Tensor, cond: Cond) -> dict[str, Tensor]:
        """The condition of a batch, the null prompt where `cond` is None, in the type of x.

        Raises ValueError where names or shapes are not those of `shapes`.
        """
        null = self.null()
        if cond is None:
            return {name: b.to(x.dtype).expand(x.shape[0], *b.shape) for name, b in null.items()}
        if not isinstance(cond, Mapping) or cond.keys() != null.keys():
            names = ", ".join(cond) if isinstance(cond, Mapping) else type(cond).__name__
            raise ValueError(f"a condition is a mapping of {', '.join(null)}; got {names}")
        for name, buffer in null.items():
            expected = (x.shape[0], *buffer.shape)
            if cond[name].shape != expected:
                raise ValueError(
                    f"cond[{name!r}] has shape {tuple(cond[name].shape)}, expected {expected}"
                )
        return {name: cond[name].to(x) for name in null}

    def forward(self, x: Tensor, label: Tensor, cond: Cond = None) -> Tensor:
        """The prediction (B, C, H, W) for x (B, C, H, W), label (B,) and cond.

        A learned variance is dropped. Raises ValueError for a condition of another form.
        """
        arguments = self.arguments(x, label, self.conditions(x, cond))
        out: Tensor = self.net(self.laid_out(x), **arguments, return_dict=False)[0]
        out = self.put_back(out, x.shape)
        # half of the channels is a learned variance, which diffusers' samplers drop too
        return out.chunk(2, 1)[0] if out.shape[1] == 2 * x.shape[1] else out

    def encode(self, x: Tensor, label: Tensor, cond: Cond = None) -> Tensor:
        """The encoder features alone; later layers are not computed."""
        captured: list[Tensor] = []

        def stop(features: Tensor) -> None:
            captured.append(features)
            raise _Heard

        with self._tap(stop), suppress(_Heard):
            self(x, label, cond)
        return captured[0]

    def forward_with_features(
        self, x: Tensor, label: Tensor, cond: Cond = None
    ) -> tuple[Tensor, Tensor]:
        """(F(x, label, cond), features) from one pass."""
        features: list[Tensor] = []
        with self._tap(features.append):
            out = self(x, label, cond)
        return out, features[0]

    @contextmanager
    def _tap(self, hear: Callable[[Tensor], None]) -> Iterator[None]:
        """Within the block, `hear` is called with the input of `middle`, channels first."""

        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            features: Tensor = args[0] if args else named["hidden_states"]
            hear(features.transpose(1, 2) if features.ndim == 3 else features)

        handle = self.middle().register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
