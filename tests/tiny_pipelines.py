"""Tiny random pipelines in the classes of diffusers, built offline from configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests.tiny_text import clip, clip_tokenizer, t5, t5_tokenizer


def vae(channels: int = 4, **more: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        **more,
    ).eval()


def unet(cross: int, **more: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    ).eval()


def scheduler(prediction: str = "epsilon", **more: Any) -> diffusers.DDIMScheduler:
    """Stable Diffusion's."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **more,
    )


def sd(home: Path, prediction: str = "epsilon", **more: Any) -> Any:
    words = clip_tokenizer(home / "words")
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(False, words),
        tokenizer=words,
        unet=unet(16),
        scheduler=scheduler(prediction, **more),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd_v(home: Path) -> Any:
    return sd(home, "v_prediction")


def sdxl(home: Path) -> Any:
    words = clip_tokenizer(home / "words")
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(False, words),
        text_encoder_2=clip(True, words),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet(
            32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
        ),
        scheduler=scheduler(),
    )


def sd3(home: Path) -> Any:
    words, pieces = clip_tokenizer(home / "words"), t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip(True, words),
        text_encoder_2=clip(True, words),
        text_encoder_3=t5(pieces),
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=pieces,
    )


def pixart(home: Path, sized: bool = False, cls: Any = diffusers.PixArtAlphaPipeline) -> Any:
    pieces = t5_tokenizer()
    return cls(
        tokenizer=pieces,
        text_encoder=t5(pieces),
        vae=vae(),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            attention_head_dim=12,
            num_attention_heads=2,
            cross_attention_dim=24,
            caption_channels=32,
            norm_num_groups=4,
            use_additional_conditions=sized,
        ).eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def pixart_sized(home: Path) -> Any:
    """As the 1024 pixel model, which is told the size of its picture."""
    return pixart(home, sized=True)


def pixart_sigma(home: Path) -> Any:
    return pixart(home, cls=diffusers.PixArtSigmaPipeline)


def sana(home: Path) -> Any:
    home.mkdir(parents=True, exist_ok=True)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = [*special, "▁", *(chr(c) for c in range(32, 127))]
    words = transformers.GemmaTokenizer(vocab={p: i for i, p in enumerate(letters)}, merges=[])
    config = transformers.Gemma2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return diffusers.SanaPipeline(
        tokenizer=words,
        text_encoder=transformers.Gemma2Model(config).eval(),
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            upsample_block_type="interpolate",
            downsample_block_type="stride_conv",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ).eval(),
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
        ).eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def flux(home: Path, guided: bool = False) -> Any:
    """FLUX.1-schnell for 8x8 latents; or, with distilled guidance and dynamic shift, as -dev."""
    words, pieces = clip_tokenizer(home / "words"), t5_tokenizer()
    dynamic = {"use_dynamic_shifting": True, "shift": 3.0} if guided else {}
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**dynamic),
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip(False, words),
        tokenizer=words,
        text_encoder_2=t5(pieces),
        tokenizer_2=pieces,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guided,
            axes_dims_rope=(2, 2, 4),
        ).eval(),
    )


def flux_guided(home: Path) -> Any:
    return flux(home, guided=True)


KINDS: dict[str, Callable[[Path], Any]] = {
    "sd": sd,
    "sd_v": sd_v,
    "sdxl": sdxl,
    "sd3": sd3,
    "pixart": pixart,
    "pixart_sized": pixart_sized,
    "pixart_sigma": pixart_sigma,
    "sana": sana,
    "flux": flux,
    "flux_guided": flux_guided,
}
FLOWS = ("sd3", "sana", "flux", "flux_guided")


def build(kind: str, home: Path, seed: int = 0) -> Path:
    """A saved pipeline folder of random weights, none of them zero."""
    torch.manual_seed(seed)
    pipe = KINDS[kind](home)
    net = getattr(pipe, "unet", None) or pipe.transformer
    for p in net.parameters():
        if not bool(p.any()):  # such as the output layers of a transformer
            torch.nn.init.normal_(p, std=0.1)
    pipe.save_pretrained(home / "pipe", safe_serialization=True)
    if kind.startswith("flux"):  # whose configuration names no size of its own
        path = home / "pipe" / "transformer" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": 8}))
    return home / "pipe"
