"""Networks of diffusers as F(x, label, cond): one class for each calling convention.

What they share is in `fewstep.teachers.diffusers.adapter_base`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.extra_inputs import TimeEmbedding
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
            # the original size, the crop's corner and the target size, all of a full picture
            ids = torch.tensor([*self.size, 0, 0, *self.size], dtype=x.dtype, device=x.device)
            sizes = ids.expand(x.shape[0], 6)
            arguments["added_cond_kwargs"] = {"text_embeds": cond["pooled"], "time_ids": sizes}
        return arguments

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """(F, h, w) of the input of the middle block."""
        widths, (_, *sides) = self.config.block_out_channels, self.sample_shape
        for _ in widths[1:]:
            sides = [(side + 1) // 2 for side in sides]
        return widths[-1], *sides

    @property
    def time_embedding(self) -> TimeEmbedding:
        """The embedding of the timestep, to which SDXL adds that of its other conditions."""
        module: Any = self.net.time_embedding
        return TimeEmbedding(module, module.linear_2.out_features)

    def middle(self) -> nn.Module:
        """The middle block."""
        return self.net.mid_block  # type: ignore[return-value]


class _Transformer(Adapter):
    """A transformer: a stack of blocks on tokens."""

    def middle(self) -> nn.Module:
        """The block half way through the stack."""
        net: Any = self.net
        return _half(net.transformer_blocks)


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

    @classmethod
    def fits(cls, config: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        """Refuse also what has more rows or columns than there are positions for."""
        super().fits(config, shape)
        most = int(config.get("pos_embed_max_size") or 96) * cls.patch(config)
        if max(shape[1:]) > most:
            raise ValueError(f"this network has positions for {most} x {most}, not for {shape}")


class PixArt(_Transformer):
    """PixArtTransformer2DModel; the 1024 pixel model also takes the size of the picture."""

    flow = False
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {"attention_type": ("default",)}
    embeds_time = "adaln_single.emb"
    learned_variance = True

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """prompt (tokens, D) and its mask (tokens,)."""
        return {"prompt": (tokens, self.config.caption_channels), "mask": (tokens,)}

    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Timestep, embedded prompt and mask; resolution and aspect ratio where they are used."""
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if getattr(self.net, "use_additional_conditions", False):
            size = {
                "resolution": x.new_tensor([self.size]).expand(x.shape[0], 2),
                "aspect_ratio": x.new_full((x.shape[0], 1), self.size[0] / self.size[1]),
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
    embeds_time = "time_embed.emb"
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


class _Packed(Adapter):
    """A transformer whose tokens are 2x2 squares of a sample, packed here.

    Its configuration names no size: the stock pipeline's 128 is used unless "sample_size" says
    otherwise.
    """

    @classmethod
    def shape(cls, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """(C, H, W) of a sample before it is packed into tokens of 4 C channels."""
        channels, *sides = super().shape({"in_channels": 64, **_sized(config)})
        if channels % 4 or sides[0] % 2 or sides[1] % 2:
            raise ValueError(
                f"these networks need an even sample_size and in_channels that four divides, got "
                f"{sides} and {channels}"
            )
        return channels // 4, sides[0], sides[1]

    @staticmethod
    def channels(config: Mapping[str, Any]) -> int:
        """Channels of the output, unpacked."""
        out = config.get("out_channels")
        return int(config["in_channels"] if out is None else out) // 4

    @staticmethod
    def patch(config: Mapping[str, Any]) -> int:
        """Side of the square that is one token: 2."""
        return 2

    def laid_out(self, x: Tensor) -> Tensor:
        """Pack (B, C, H, W) into tokens (B, H W / 4, 4 C)."""
        return F.pixel_unshuffle(x, 2).flatten(2).mT

    def put_back(self, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Unpack tokens (B, H W / 4, 4 C) to (B, C, H, W)."""
        return F.pixel_shuffle(out.mT.unflatten(2, (shape[-2] // 2, shape[-1] // 2)), 2)

    @property
    def call(self) -> dict[str, float]:
        """Guidance scale and picture size, of which the stock pipeline knows nothing."""
        return {"guidance_scale": 0.0, "height": self.size[0], "width": self.size[1]}


def _sized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the size that stock pipelines take where it names none."""
    return {**config, "sample_size": config.get("sample_size") or 128}


def _half(*stacks: nn.Module) -> nn.Module:
    """The block half way through stacks of blocks."""
    blocks: Any = [block for stack in stacks for block in stack]  # type: ignore[attr-defined]
    out: nn.Module = blocks[len(blocks) // 2]
    return out


class Flux(_Packed, _Joint):
    """FluxTransformer2DModel, a flow on packed tokens; its timestep is t.

    A network with distilled guidance (FLUX.1-dev) gets its pipeline's default scale, 3.5; a
    student gets the same input, and its pipeline is called with it.
    """

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
        return {**super().call, "guidance_scale": 3.5 if self.config.guidance_embeds else 0.0}

    def middle(self) -> nn.Module:
        """The block half way through both stacks."""
        net: Any = self.net
        return _half(net.transformer_blocks, net.single_transformer_blocks)


class Flux2(Adapter):
    """Flux2Transformer2DModel, a flow; its timestep is t, and every position is a token.

    A sample is what the stock pipeline calls packed latents: the VAE's, 2x2 squares folded into
    channels, and normalised. The size is as FLUX's. A network with distilled guidance
    (FLUX.2-dev) gets its pipeline's default scale, 4.
    """

    scaled_latents = True
    embeds_time = "time_guidance_embed"

    @classmethod
    def shape(cls, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """(C, H, W); the stock pipeline's 64 positions a side unless "sample_size" says more."""
        return super().shape({**config, "sample_size": config.get("sample_size") or 64})

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """prompt (tokens, D)."""
        return {"prompt": (tokens, self.config.joint_attention_dim)}

    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Timestep, embedded prompt, positions (time, row, column, word), and guidance."""
        one, rows, columns = (torch.arange(n) for n in (1, x.shape[2], x.shape[3]))
        words = torch.arange(cond["prompt"].shape[1])
        scale = self.call["guidance_scale"]
        return {
            "timestep": label,
            "encoder_hidden_states": cond["prompt"],
            "img_ids": torch.cartesian_prod(one, rows, columns, one).to(x),
            "txt_ids": torch.cartesian_prod(one, one, one, words).to(x),
            "guidance": x.new_full((x.shape[0],), scale) if scale else None,
        }

    @property
    def call(self) -> dict[str, float]:
        """Arguments of the stock pipeline of a student: guidance scale and picture size."""
        scale = 4.0 if self.config.guidance_embeds else 0.0
        return {"guidance_scale": scale, "height": self.size[0], "width": self.size[1]}

    def laid_out(self, x: Tensor) -> Tensor:
        """Every position as a token: (B, H W, C)."""
        return x.flatten(2).mT

    def put_back(self, out: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Tokens (B, H W, C) as (B, C, H, W)."""
        rows: Tensor = out.mT.unflatten(2, (shape[-2], shape[-1]))
        return rows

    def to_stock(self, x: Tensor) -> Tensor:
        """As it is."""
        return x

    def from_stock(self, out: Tensor) -> Tensor:
        """As it is: the VAE's own latents."""
        return out

    def drawn(self, noise: Tensor) -> Tensor:
        """The loop's layout is that of tokens, and its numbers come in that order."""
        tokens = noise.reshape(len(noise), -1, noise.shape[1])
        return self.put_back(tokens, self.sample_shape)

    def middle(self) -> nn.Module:
        """The block half way through both stacks."""
        net: Any = self.net
        return _half(net.transformer_blocks, net.single_transformer_blocks)


class QwenImage(_Packed, _Transformer):
    """QwenImageTransformer2DModel, a flow on packed tokens; its timestep is t."""

    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **{"guidance_embeds": (False,), "zero_cond_t": (False,)},
        **{"use_additional_t_cond": (False,), "use_layer3d_rope": (False,)},
    }

    @staticmethod
    def channels(config: Mapping[str, Any]) -> int:
        """Channels of the output, which are counted before they are packed."""
        out = config.get("out_channels")
        return int(config["in_channels"] // 4 if out is None else out)

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """prompt (tokens, D) and its mask (tokens,)."""
        return {"prompt": (tokens, self.config.joint_attention_dim), "mask": (tokens,)}

    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Timestep, embedded prompt and mask, and the size in tokens."""
        size = (1, x.shape[2] // 2, x.shape[3] // 2)
        return {
            "timestep": label,
            "encoder_hidden_states": cond["prompt"],
            "encoder_hidden_states_mask": cond["mask"].bool(),
            "img_shapes": [
                [size]
            ],  # of all; a list as long as a batch would fix its size in graphs
        }

    @property
    def call(self) -> dict[str, float]:
        """Arguments of the stock pipeline of a student, which guides by another name."""
        return {"true_cfg_scale": 1.0, "height": self.size[0], "width": self.size[1]}


class ZImage(Adapter):
    """ZImageTransformer2DModel, a flow; it is told 1 - t, and answers with x_0 - eps.

    It takes lists, of a sample (C, 1, H, W) and of a prompt's own words each: where the words end
    the positions of the picture begin, so a prompt may not be filled up.
    """

    own_lengths = True
    embeds_time = "t_embedder"
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **{"all_patch_size": ([2], (2,)), "all_f_patch_size": ([1], (1,))},
        "siglip_feat_dim": (None,),
    }

    @classmethod
    def shape(cls, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """(C, H, W); the stock pipeline's 128 unless "sample_size" says otherwise."""
        return super().shape({"in_channels": 16, **_sized(config)})

    @staticmethod
    def patch(config: Mapping[str, Any]) -> int:
        """Side of the square that is one token: 2."""
        return 2

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """(F,) of tokens of sample and prompt."""
        return (self.config.dim,)

    @property
    def time_embedding(self) -> TimeEmbedding:
        """Where the network embeds its time, in 256 numbers at most."""
        module: Any = self.net.t_embedder
        return TimeEmbedding(module, module.mlp[-1].out_features)

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """prompt (tokens, D) and its mask (tokens,)."""
        return {"prompt": (tokens, self.config.cap_feat_dim), "mask": (tokens,)}

    def arguments(self, x: Tensor, label: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """1 - t, and each prompt's own words."""
        words, mask = cond["prompt"], cond["mask"]
        known = mask.device.type != "meta"
        counts = mask.sum(1).long().tolist() if known else [words.shape[1]] * len(words)
        rows = [row[: max(count, 1)] for row, count in zip(words, counts, strict=True)]
        return {"t": 1 - label, "cap_feats": rows}

    @property
    def call(self) -> dict[str, float]:
        """Arguments of the stock pipeline of a student."""
        return {"guidance_scale": 0.0, "height": self.size[0], "width": self.size[1]}

    def laid_out(self, x: Tensor) -> Any:
        """A list of (C, 1, H, W)."""
        return list(x[:, :, None].unbind(0))

    def put_back(self, out: Any, shape: tuple[int, ...]) -> Tensor:
        """The velocity eps - x_0 of a list of answers."""
        return -torch.stack(list(out))[:, :, 0]

    def to_stock(self, x: Tensor) -> Tensor:
        """As it is."""
        return x

    def from_stock(self, out: Tensor) -> Tensor:
        """As it is."""
        return out

    def middle(self) -> nn.Module:
        """The block half way through the stack on words and sample."""
        layers: Any = self.net.layers
        return _half(layers)


ADAPTERS: Mapping[str, type[Adapter]] = {
    "UNet2DConditionModel": UNet,
    "SD3Transformer2DModel": SD3,
    "PixArtTransformer2DModel": PixArt,
    "SanaTransformer2DModel": Sana,
    "FluxTransformer2DModel": Flux,
    "Flux2Transformer2DModel": Flux2,
    "QwenImageTransformer2DModel": QwenImage,
    "ZImageTransformer2DModel": ZImage,
}
"""How each class of network is called."""
