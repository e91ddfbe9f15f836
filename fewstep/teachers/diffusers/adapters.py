"""Networks of diffusers as F(x, label, cond): one class for each calling convention.

What they share is in `fewstep.teachers.diffusers.adapter_base`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.teachers.diffusers.adapter_base import Adapter


class UNet(Adapter):
    """UNet2DConditionModel: Stable Diffusion 1 and 2, and SDXL with its size conditions."""

    flow = False
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **{"time_cond_proj_dim": (None,), "class_embed_type": (None,)},
        **{"num_class_embeds": (None,), "encoder_hid_dim": (None,)},
        **{"encoder_hid_dim_type": (None,), "attention_type": ("default",)},
        "addition_embed_type": (None, "text_time"),
        "mid_block_type": (
            "UNetMidBlock2DCrossAttn",
            "UNetMidBlock2DSimpleCrossAttn",
            "UNetMidBlock2D",
        ),
    }

    def __init__(self, net: nn.Module, tokens: int, pixels: int) -> None:
        super().__init__(net, tokens, pixels)
        if self.config.addition_embed_type == "text_time":
            # the original size, the crop's corner and the target size, all of a full picture
            sizes = torch.tensor([pixels, pixels, 0, 0, pixels, pixels], dtype=torch.float32)
            self.register_buffer("time_ids", sizes, persistent=False)

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """prompt (tokens, D) and, in SDXL, pooled (P,)."""
        config = self.config
        prompt = {"prompt": (tokens, config.cross_attention_dim)}
        if config.addition_embed_type != "text_time":
            return {**prompt}
        sizes = 6 * config.addition_time_embed_dim
        return {**prompt, "pooled": (config.projection_class_embeddings_input_dim - sizes,)}

    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Timestep and embedded prompt; in SDXL also the pooled prompt and the picture size."""
        arguments: dict[str, Any] = {"timestep": label, "encoder_hidden_states": cond["prompt"]}
        if "pooled" in cond:
            ids = self.time_ids.to(x).expand(x.shape[0], 6)  # type: ignore[operator]
            arguments["added_cond_kwargs"] = {"text_embeds": cond["pooled"], "time_ids": ids}
        return arguments

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """(F, h, w) of the input of the middle block."""
        widths, side = self.config.block_out_channels, self.config.sample_size
        for _ in widths[1:]:
            side = (side + 1) // 2
        return widths[-1], side, side

    def middle(self) -> nn.Module:
        """The middle block."""
        return self.net.mid_block  # type: ignore[return-value]


class _Transformer(Adapter):
    """A transformer: a stack of blocks on tokens."""

    def middle(self) -> nn.Module:
        """The block half way through the stack."""
        blocks: Any = self.net.transformer_blocks
        out: nn.Module = blocks[len(blocks) // 2]
        return out


class _Joint(Adapter):
    """A transformer with joint attention to samples and prompt, beside one pooled vector."""

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """prompt (tokens, D) and pooled (P,)."""
        config = self.config
        return {
            "prompt": (tokens, config.joint_attention_dim),
            "pooled": (config.pooled_projection_dim,),
        }


class SD3(_Joint, _Transformer):
    """SD3Transformer2DModel, a flow; its timestep is 1000 t."""

    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Timestep 1000 t, embedded and pooled prompt."""
        return {
            "timestep": 1000 * label,
            "encoder_hidden_states": cond["prompt"],
            "pooled_projections": cond["pooled"],
        }


class PixArt(_Transformer):
    """PixArtTransformer2DModel; the 1024 pixel model also takes the size of the picture."""

    flow = False
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {"attention_type": ("default",)}
    learned_variance = True

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """prompt (tokens, D) and its mask (tokens,)."""
        return {"prompt": (tokens, self.config.caption_channels), "mask": (tokens,)}

    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Timestep, embedded prompt and mask; resolution and aspect ratio where they are used."""
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
    """SanaTransformer2DModel, a flow; its timestep is 1000 t times `timestep_scale`."""

    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {"guidance_embeds": (False,)}
    learned_variance = True

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """prompt (tokens, D) and its mask (tokens,)."""
        return {"prompt": (tokens, self.config.caption_channels), "mask": (tokens,)}

    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Scaled timestep, embedded prompt and mask."""
        return {
            "timestep": 1000 * label * self.config.timestep_scale,
            "encoder_hidden_states": cond["prompt"],
            "encoder_attention_mask": cond["mask"],
        }


class Flux(_Joint):
    """FluxTransformer2DModel, a flow on 2x2 squares as tokens, packed here; its timestep is t.

    Its configuration names no size: the stock pipeline's 128 is used unless "sample_size" says
    otherwise. A network with distilled guidance (FLUX.1-dev) gets its pipeline's default scale,
    3.5; a student gets the same input, and its pipeline is called with it.
    """

    @staticmethod
    def shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
        """(C, H, W) of a sample before it is packed into tokens of 4 C channels."""
        channels, size = config.get("in_channels", 64), config.get("sample_size", 128)
        if not (isinstance(size, int) and isinstance(channels, int)) or size % 2 or channels % 4:
            raise ValueError(
                f"FLUX needs an even sample_size and in_channels that four divides, got {size} "
                f"and {channels}"
            )
        return channels // 4, size, size

    @staticmethod
    def channels(config: Mapping[str, Any]) -> int:
        """Channels of the output, unpacked."""
        out = config.get("out_channels")
        return int(config["in_channels"] if out is None else out) // 4

    @staticmethod
    def patch(config: Mapping[str, Any]) -> int:
        """Side of the square that is one token: 2."""
        return 2

    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Timestep, embedded and pooled prompt, positions of tokens, and the guidance scale."""
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        places = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
        scale = self.call["guidance_scale"]
        return {
            "timestep": label,
            "encoder_hidden_states": cond["prompt"],
            "pooled_projections": cond["pooled"],
            "img_ids": places.to(x),
            "txt_ids": x.new_zeros(cond["prompt"].shape[1], 3),
            "guidance": x.new_full((x.shape[0],), scale) if scale else None,
        }

    @property
    def call(self) -> dict[str, float]:
        """Arguments of the stock pipeline of a student: guidance scale and picture size."""
        scale = 3.5 if self.config.guidance_embeds else 0.0
        return {"guidance_scale": scale, "height": self.pixels, "width": self.pixels}

    def laid_out(self, x: Tensor) -> Tensor:
        """Pack (B, C, H, W) into tokens (B, H W / 4, 4 C)."""
        return F.pixel_unshuffle(x, 2).flatten(2).mT

    def put_back(self, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Unpack tokens (B, H W / 4, 4 C) to (B, C, H, W)."""
        return F.pixel_shuffle(out.mT.unflatten(2, (shape[-2] // 2, shape[-1] // 2)), 2)

    def middle(self) -> nn.Module:
        """The block half way through both stacks."""
        net: Any = self.net
        blocks = [*net.transformer_blocks, *net.single_transformer_blocks]
        out: nn.Module = blocks[len(blocks) // 2]
        return out


ADAPTERS: Mapping[str, type[Adapter]] = {
    "UNet2DConditionModel": UNet,
    "SD3Transformer2DModel": SD3,
    "PixArtTransformer2DModel": PixArt,
    "SanaTransformer2DModel": Sana,
    "FluxTransformer2DModel": Flux,
}
"""How each class of network is called."""
