"""Tensors of diffusers' networks under the names of the code that first trained them.

    U-Net          input_blocks.0.0 ... middle_block.0 ... output_blocks.11.1 ... out.2
    autoencoder    encoder.down.0.block.0 ... decoder.up.3.upsample.conv ... decoder.conv_out
    CLIP           transformers' own names
    OpenCLIP       transformer.resblocks.0.attn.in_proj_weight ... ln_final ... text_projection

These are the layouts of Stable Diffusion 1 and 2 (https://github.com/Stability-AI/stablediffusion)
and SDXL (https://github.com/Stability-AI/generative-models). A level of n blocks in diffusers is n
entries of `input_blocks`, and one more for the downsampler behind it; `output_blocks` have n + 1 a
level, in whose last the upsampler is. `decoder.up` is counted from the last level.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]

_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
"""Layers of a residual block of a U-Net."""
_ATTENTION = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
"""Layers of an autoencoder's attention, which are convolutions there."""
_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
"""Parts of a U-Net that are there once."""
_OPEN_CLIP = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
}


def unet_names(state: State, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A UNet2DConditionModel's tensors as those of `model.diffusion_model`, without that prefix.

    config: its configuration, for `layers_per_block`. ValueError for a tensor of no known place.
    """
    layers, levels = int(config["layers_per_block"]), len(config["block_out_channels"])
    places = {**_ENDS, **dict(_blocks(state, layers, levels))}
    return {_renamed(name, places, _RESNET): tensor for name, tensor in state.items()}


def _blocks(state: State, layers: int, levels: int) -> Iterator[tuple[str, str]]:
    """Prefixes of the blocks of a U-Net, in both layouts."""
    for level in range(levels):
        first = 1 + level * (layers + 1)
        for block in range(layers):
            here = f"down_blocks.{level}"
            yield f"{here}.resnets.{block}.", f"input_blocks.{first + block}.0."
            yield f"{here}.attentions.{block}.", f"input_blocks.{first + block}.1."
        yield (
            f"down_blocks.{level}.downsamplers.0.conv.",
            f"input_blocks.{first + layers}.0.op.",
        )
        first = level * (layers + 1)
        for block in range(layers + 1):
            here = f"up_blocks.{level}"
            yield f"{here}.resnets.{block}.", f"output_blocks.{first + block}.0."
            yield f"{here}.attentions.{block}.", f"output_blocks.{first + block}.1."
        attends = any(name.startswith(f"up_blocks.{level}.attentions.") for name in state)
        last = f"output_blocks.{first + layers}.{2 if attends else 1}.conv."
        yield f"up_blocks.{level}.upsamplers.0.conv.", last


def vae_names(state: State, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """An AutoencoderKL's tensors as those of `first_stage_model`, without that prefix.

    config: its configuration, for its levels. ValueError for a tensor of no known place.
    """
    levels, layers = len(config["block_out_channels"]), int(config["layers_per_block"])
    places: dict[str, str] = {name: name for name in ("quant_conv.", "post_quant_conv.")}
    for side in ("encoder", "decoder"):
        places |= {
            f"{side}.conv_in.": f"{side}.conv_in.",
            f"{side}.conv_out.": f"{side}.conv_out.",
        }
        places[f"{side}.conv_norm_out."] = f"{side}.norm_out."
        places |= {f"{side}.mid_block.resnets.{i}.": f"{side}.mid.block_{i + 1}." for i in (0, 1)}
        places[f"{side}.mid_block.attentions.0."] = f"{side}.mid.attn_1."
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for block in range(layers + 1):
            places[f"encoder.down_blocks.{level}.resnets.{block}."] = f"{down}.block.{block}."
            places[f"decoder.up_blocks.{level}.resnets.{block}."] = f"{up}.block.{block}."
        places[f"encoder.down_blocks.{level}.downsamplers.0."] = f"{down}.downsample."
        places[f"decoder.up_blocks.{level}.upsamplers.0."] = f"{up}.upsample."
    inner = {**_ATTENTION, "conv_shortcut.": "nin_shortcut."}
    out = {}
    for name, tensor in state.items():
        linear = ".attentions." in name and name.endswith("weight") and tensor.ndim == 2
        out[_renamed(name, places, inner)] = tensor[:, :, None, None] if linear else tensor
    return out


def clip_names(state: State) -> dict[str, Tensor]:
    """A CLIPTextModel's tensors with the prefix "text_model.", as older files of it have them."""
    return {f"text_model.{name.removeprefix('text_model.')}": t for name, t in state.items()}


def open_clip_names(state: State) -> dict[str, Tensor]:
    """A CLIP text model's tensors as those of OpenCLIP's.

    Queries, keys and values are one tensor there, in this order, and the projection is transposed.
    """
    out: dict[str, Tensor] = {}
    for whole, tensor in state.items():
        name = whole.removeprefix("text_model.")
        if name == "text_projection.weight":
            out["text_projection"] = tensor.T
        elif not name.startswith("encoder.layers."):
            out[_renamed(name, _OPEN_CLIP_ENDS, {})] = tensor
        elif ".self_attn.q_proj." in name:
            parts = [state[whole.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            head, kind = name.split(".self_attn.q_proj.")
            place = head.replace("encoder.layers.", "transformer.resblocks.")
            out[f"{place}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            _, _, number, rest = name.split(".", 3)
            out[f"transformer.resblocks.{number}.{_renamed(rest, _OPEN_CLIP, {})}"] = tensor
    return out


def _renamed(name: str, places: Mapping[str, str], inner: Mapping[str, str]) -> str:
    """`name` with its prefix changed by `places`, and what follows by `inner`."""
    for old, new in places.items():
        if name.startswith(old):
            rest = name.removeprefix(old)
            layer = next((mine for mine in inner if rest.startswith(mine)), "")
            return new + (inner[layer] + rest.removeprefix(layer) if layer else rest)
    raise ValueError(f"the original layout has no place for {name}")
