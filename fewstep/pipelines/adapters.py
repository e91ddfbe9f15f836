"""Networks of diffusers as F(x, label, cond), with an encoder tap.

One class a calling convention; what is common stands first. `cond` is a mapping of tensors, such
as {"prompt": (B, L, D)}, and None is the null prompt: the network holds its embedding as buffers,
which is what classifier-free guidance calls upon.

The features of the tap are, in a U-Net, what its last down block hands to the middle block; in a
transformer, the tokens half way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core import Cond


class _Heard(Exception):
    """The features are there; the rest of the network is not needed."""


class Adapter(nn.Module, ABC):
    """A diffusers network for samples (C, H, W), and the null prompt of `tokens` words."""

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

    @abstractmethod
    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of a condition, without the batch."""

    @abstractmethod
    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """What the network is called with, by name, beside x."""

    @abstractmethod
    def middle(self) -> nn.Module:
        """The module whose input the tap hands out."""

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
        out: Tensor = self.net(x, **told, return_dict=False)[0]
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


class UNet(Adapter):
    """UNet2DConditionModel: Stable Diffusion 1 and 2, and SDXL with its size conditions."""

    def __init__(self, net: nn.Module, tokens: int, pixels: int) -> None:
        super().__init__(net, tokens, pixels)
        if self.config.addition_embed_type == "text_time":
            # the original size, the crop's corner and the target size, all of a full picture
            sizes = torch.tensor([pixels, pixels, 0, 0, pixels, pixels], dtype=torch.float32)
            self.register_buffer("time_ids", sizes, persistent=False)

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.config
        prompt = {"prompt": (tokens, config.cross_attention_dim)}
        if config.addition_embed_type != "text_time":
            return {**prompt}
        sizes = 6 * config.addition_time_embed_dim
        return {**prompt, "pooled": (config.projection_class_embeddings_input_dim - sizes,)}

    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        told: dict[str, Any] = {"timestep": label, "encoder_hidden_states": cond["prompt"]}
        if "pooled" in cond:
            ids = self.time_ids.to(x).expand(x.shape[0], 6)  # type: ignore[operator]
            told["added_cond_kwargs"] = {"text_embeds": cond["pooled"], "time_ids": ids}
        return told

    def middle(self) -> nn.Module:
        return self.net.mid_block  # type: ignore[return-value]


class _Transformer(Adapter):
    """A stack of blocks on tokens."""

    def middle(self) -> nn.Module:
        blocks: Any = self.net.transformer_blocks
        return blocks[len(blocks) // 2]


class SD3(_Transformer):
    """SD3Transformer2DModel, a flow; it is told 1000 t."""

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.config
        return {
            "prompt": (tokens, config.joint_attention_dim),
            "pooled": (config.pooled_projection_dim,),
        }

    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "timestep": 1000 * label,
            "encoder_hidden_states": cond["prompt"],
            "pooled_projections": cond["pooled"],
        }


class PixArt(_Transformer):
    """PixArtTransformer2DModel; the 1024 pixel model is told the size of the picture too."""

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"prompt": (tokens, self.config.caption_channels), "mask": (tokens,)}

    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if getattr(self.net, "use_additional_conditions", False):
            size = {
                "resolution": x.new_full((x.shape[0], 2), self.pixels),
                "aspect_ratio": x.new_ones(x.shape[0], 1),
            }
        return {
            "timestep": label,
            "encoder_hidden_states": cond["prompt"],
            "encoder_attention_mask": cond["mask"],
            "added_cond_kwargs": size,
        }


class Sana(_Transformer):
    """SanaTransformer2DModel, a flow; it is told 1000 t, times its own scale."""

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"prompt": (tokens, self.config.caption_channels), "mask": (tokens,)}

    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "timestep": 1000 * label * self.config.timestep_scale,
            "encoder_hidden_states": cond["prompt"],
            "encoder_attention_mask": cond["mask"],
        }


ADAPTERS: Mapping[str, type[Adapter]] = {
    "UNet2DConditionModel": UNet,
    "SD3Transformer2DModel": SD3,
    "PixArtTransformer2DModel": PixArt,
    "SanaTransformer2DModel": Sana,
}
"""How each class of network is called."""
