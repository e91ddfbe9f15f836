"""Pipelines of published sizes with random weights: what clients tell models by, for nothing.

Clients know a model by the shapes in its file. So a pipeline here has the published widths,
layers, text encoders and autoencoder, and weights that are drawn: those of a layer of fan-in n
from N(0, 1 / n), so that signals neither vanish nor grow, and biases and norms near their usual
values. Its pictures are noise with contrast that depends on all of its parts.

    sd15    Stable Diffusion 1.5                                    860 million parameters
    sdxl    Segmind Vega: SDXL with one transformer block, one and two, in place of one, two and
            ten                                                     745 million
    sd3     Stable Diffusion 3 with 12 blocks of 12 heads, in place of 24 of 24; no T5
    sdxl_whole, sd3_whole    SDXL and Stable Diffusion 3 medium themselves, for large memories
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

CLIP_L: Mapping[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
CLIP_G: Mapping[str, Any] = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SDXL: Mapping[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def drawn(module: nn.Module, seed: int) -> Any:
    """`module` with weights drawn from a seed, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p.normal_(0, p[0].numel() ** -0.5, generator=generator)
        for layer in module.modules():
            if isinstance(layer, nn.Embedding):
                layer.weight.normal_(0, 1, generator=generator)
            if isinstance(layer, nn.LayerNorm | nn.GroupNorm) and layer.weight is not None:
                layer.weight.normal_(1, 0.1, generator=generator)
    return module.requires_grad_(False).eval()


def tokenizer(words: Path, pad: str) -> Any:
    """CLIP's, of the folder with its words, which ComfyUI has."""
    return transformers.CLIPTokenizer.from_pretrained(words, pad_token=pad, model_max_length=77)


def clip(sizes: Mapping[str, Any], projects: bool, seed: int) -> Any:
    """A text encoder of CLIP."""
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    return drawn(kind(transformers.CLIPTextConfig(**sizes)), seed)


def vae(channels: int = 4, **more: Any) -> Any:
    """The autoencoder of Stable Diffusion, whose pictures are within [-1, 1] for the most part."""
    net = drawn(
        diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=channels,
            sample_size=512,
            **more,
        ),
        1,
    )
    net.decoder.conv_out.weight *= 0.5
    return net


def betas() -> Any:
    """Stable Diffusion's scheduler."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def sd15(words: Path) -> Any:
    """Stable Diffusion 1.5."""
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(CLIP_L, False, 2),
        tokenizer=tokenizer(words, "<|endoftext|>"),
        unet=drawn(unet, 0),
        scheduler=betas(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(words: Path, **more: Any) -> Any:
    """Segmind Vega, or with `more` SDXL itself."""
    sizes = {"transformer_layers_per_block": (1, 1, 2), "mid_block_type": "UNetMidBlock2D"}
    unet = diffusers.UNet2DConditionModel(**{**SDXL, **sizes, **more})
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip(CLIP_L, False, 2),
        text_encoder_2=clip(CLIP_G, True, 3),
        tokenizer=tokenizer(words, "<|endoftext|>"),
        tokenizer_2=tokenizer(words, "!"),
        unet=drawn(unet, 0),
        scheduler=betas(),
    )


def sd3(words: Path, depth: int = 12) -> Any:
    """Stable Diffusion 3 of so many blocks and heads, 24 of the medium one, without T5."""
    first = clip(CLIP_L, True, 2)
    first.text_projection.weight.copy_(torch.eye(768))  # as published
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=depth,
        attention_head_dim=64,
        num_attention_heads=depth,
        joint_attention_dim=4096,
        caption_projection_dim=64 * depth,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=drawn(transformer, 0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(
            16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=first,
        text_encoder_2=clip(CLIP_G, True, 3),
        text_encoder_3=None,
        tokenizer=tokenizer(words, "<|endoftext|>"),
        tokenizer_2=tokenizer(words, "!"),
        tokenizer_3=None,
    )


def sdxl_whole(words: Path) -> Any:
    """SDXL."""
    layers = {"transformer_layers_per_block": (1, 2, 10)}
    return sdxl(words, **layers, mid_block_type="UNetMidBlock2DCrossAttn")


def sd3_whole(words: Path) -> Any:
    """Stable Diffusion 3 medium."""
    return sd3(words, 24)


FAMILIES: Mapping[str, Callable[[Path], Any]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3": sd3,
    "sdxl_whole": sdxl_whole,
    "sd3_whole": sd3_whole,
}
