"""Original names, read back by diffusers' own converters; and those of the published files."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.export.original_names import clip_names, open_clip_names, unet_names, vae_names

diffusers = pytest.importorskip("diffusers")
stock = pytest.importorskip("diffusers.loaders.single_file_utils")

PUBLISHED = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "cross_attention_dim": 2048,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Configurations of the published networks."""
KEYS = {"sd1": 686, "sd2": 686, "sdxl": 1680}
"""Tensors of the published networks, as their safetensors have them."""
CHECKED = {
    "sd1": "output_blocks.11.0.skip_connection.weight",
    "sd2": "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
    "sdxl": "label_emb.0.0.weight",
}
"""By what diffusers itself knows a file of each, or converts it."""


def same(found: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Equal names, and the same tensor behind each (those without values are told by shape)."""
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].shape == tensor.shape, name
        assert tensor.is_meta or torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", PUBLISHED)
def test_unets_of_published_sizes(name: str) -> None:
    """All places of the real networks, without values: each name is read back as itself."""
    with torch.device("meta"):
        net: Any = diffusers.UNet2DConditionModel(**PUBLISHED[name])
    state = net.state_dict()
    made = unet_names(state, net.config)
    assert len(made) == len(state) == KEYS[name]
    assert CHECKED[name] in made
    under = {f"model.diffusion_model.{key}": tensor for key, tensor in made.items()}
    same(stock.convert_ldm_unet_checkpoint(under, net.config), state)
    top = "input_blocks.11.0." if name != "sdxl" else "input_blocks.8.0."
    assert any(key.startswith(top) for key in made)
    assert not any(re.match(r"input_blocks\.(12|9)\.", key) for key in made if name == "sdxl")


def tiny_unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


def test_values_of_a_unet_and_planted_mistakes() -> None:
    """Every tensor, and a swap of two of one shape is seen."""
    net = tiny_unet()
    state = net.state_dict()
    under = {f"model.diffusion_model.{k}": t for k, t in unet_names(state, net.config).items()}
    same(stock.convert_ldm_unet_checkpoint(under, net.config), state)
    a, b = (f"model.diffusion_model.middle_block.{i}.in_layers.2.weight" for i in (0, 2))
    under[a], under[b] = under[b], under[a]
    found = stock.convert_ldm_unet_checkpoint(under, net.config)
    with pytest.raises(AssertionError):
        same(found, state)
    with pytest.raises(ValueError, match="has no place for motion_modules"):
        unet_names({"motion_modules.0.weight": torch.zeros(1)}, net.config)


def test_values_of_an_autoencoder() -> None:
    vae: Any = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
    )
    state = vae.state_dict()
    made = vae_names(state, vae.config)
    assert made["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert {"decoder.up.2.upsample.conv.weight", "encoder.down.0.downsample.conv.bias"} <= {*made}
    assert "decoder.up.0.upsample.conv.weight" not in made
    assert "encoder.down.2.block.0.nin_shortcut.weight" in made
    under = {f"first_stage_model.{name}": tensor for name, tensor in made.items()}
    same(stock.convert_ldm_vae_checkpoint(under, vae.config), state)


def test_values_of_text_encoders() -> None:
    """CLIP's names are transformers' own; OpenCLIP's are read back by diffusers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=12,
    )
    model = CLIPTextModelWithProjection(config)
    state = model.state_dict()
    made = open_clip_names(state)
    assert made["transformer.resblocks.2.attn.in_proj_weight"].shape == (48, 16)
    assert made["text_projection"].shape == (16, 12)
    under = {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in made.items()}
    found = stock.convert_open_clip_checkpoint(model, under, "conditioner.embedders.1.model.")
    same(found, state)
    plain = CLIPTextModel(config).state_dict()
    named = clip_names(plain)
    assert all(name.startswith("text_model.") for name in named)
    assert "text_model.embeddings.position_embedding.weight" in named
    back = stock.convert_ldm_clip_checkpoint(
        {f"cond_stage_model.transformer.{name}": tensor for name, tensor in named.items()}
    )
    same(
        {k.removeprefix("text_model."): t for k, t in back.items()},
        {k.removeprefix("text_model."): t for k, t in plain.items()},
    )
