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

from fewstep.diffusion.extra_inputs import TimeEmbedding
from fewstep.diffusion.types import Cond


def _side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class _Heard(Exception):
    """Stops a forward pass once the features are there."""


class Adapter(nn.Module, ABC):
    """A diffusers network for samples (C, H, W), with the null prompt of `tokens` tokens.

    scale: pixels along a side of one position of a sample.
    """

    flow: ClassVar[bool] = True
    """Whether such networks are trained on a flow, or on betas."""
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Keys of the configuration that ask for inputs or layers of another kind -> the values that
    do not."""
    embeds_time: ClassVar[str] = "time_text_embed"
    """Name of the module that returns the time embedding."""
    learned_variance: ClassVar[bool] = False
    """Whether the network may answer with twice the channels, the second half of no use here."""

    scaled_latents: ClassVar[bool] = False
    """Whether the stock pipeline gives away the VAE's latents, not the network's samples."""
    own_lengths: ClassVar[bool] = False
    """Whether prompts have no common length, so that there is no one graph for all."""

    def __init__(self, net: nn.Module, tokens: int, shape: tuple[int, ...], scale: int) -> None:
        super().__init__()
        self.net = net
        self.scale = scale
        self.resize(shape)
        for name, size in self.shapes(tokens).items():
            self.register_buffer(f"null_{name}", torch.zeros(size))

    def resize(self, shape: tuple[int, ...]) -> None:
        """From now on samples have this shape (C, H, W)."""
        self.sample_shape = shape

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a picture, in pixels."""
        return self.scale * self.sample_shape[1], self.scale * self.sample_shape[2]

    @property
    def config(self) -> Any:
        """The network's configuration."""
        return self.net.config

    @classmethod
    def shape(cls, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """The shape of a sample that a configuration names; ValueError where it names none."""
        channels, size = config.get("in_channels"), config.get("sample_size")
        sides = size if isinstance(size, list | tuple) else (size, size)
        if not isinstance(channels, int) or len(sides) != 2 or not all(map(_side, sides)):
            raise ValueError("the configuration says no sample_size and in_channels")
        return channels, sides[0], sides[1]

    @classmethod
    def fits(cls, config: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        """Raise ValueError where a network of this configuration takes no samples of `shape`."""
        own, patch = cls.shape(config), cls.patch(config)
        if len(shape) != 3 or shape[0] != own[0]:
            raise ValueError(f"this configuration is for {own}, got Model.shape {shape}")
        if shape[1] % patch or shape[2] % patch:
            raise ValueError(
                f"samples are cut into squares of {patch} x {patch}, which {shape} does not allow"
            )

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

    @property
    def time_embedding(self) -> TimeEmbedding:
        """Where the network embeds its time (`fewstep.diffusion.extra_inputs`)."""
        width = self.config.num_attention_heads * self.config.attention_head_dim
        return TimeEmbedding(self.net.get_submodule(self.embeds_time), width)

    def laid_out(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) in the layout that the network takes."""
        return x

    def put_back(self, out: Any, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `laid_out`, of a network's answer; shape: (..., H, W)."""
        result: Tensor = out
        return result

    def to_stock(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) in the layout of the stock pipeline's `latents`."""
        return self.laid_out(x)

    def from_stock(self, out: Tensor) -> Tensor:
        """Latents as the stock pipeline gives them, (B, ...), as (B, C, H, W)."""
        return self.put_back(out, self.sample_shape)

    def drawn(self, noise: Tensor) -> Tensor:
        """Noise that the stock pipeline draws in its loop, in the layout of `to_stock`, as x."""
        return self.from_stock(noise)

    @property
    def call(self) -> dict[str, float]:
        """Arguments of the stock pipeline of a student, so that it adds no guidance of its own.

        The size, too, where the pipeline would take another by default.
        """
        height, width = self.size
        own = self.sample_shape == self.shape(self.config)
        size = {} if own else {"height": height, "width": width}
        return {"guidance_scale": 0.0, **size}

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
        answer = self.net(self.laid_out(x), **arguments, return_dict=False)[0]
        out = self.put_back(answer, x.shape)
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


def adapter_of(denoiser: Any) -> Adapter | None:
    """The network of diffusers within a denoiser, whatever wraps it; None where there is none."""
    modules = denoiser.modules() if isinstance(denoiser, nn.Module) else ()
    return next((module for module in modules if isinstance(module, Adapter)), None)
