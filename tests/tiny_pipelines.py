"""Tiny random pipelines in the classes of diffusers, built offline from configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests.tiny_text import (
    bert,
    bert_tokenizer,
    clip,
    clip_tokenizer,
    qwen3,
    qwen_tokenizer,
    qwen_vl,
    t5,
    t5_tokenizer,
)


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


def sd_bert(home: Path) -> Any:
    """Stable Diffusion with a text encoder that nobody published one with."""
    pipe = sd(home)
    words = bert_tokenizer()
    pipe.register_modules(tokenizer=words, text_encoder=bert(words))
    return pipe


def sd35(home: Path) -> Any:
    """As SD3.5 medium: normalised queries and keys, and second attentions."""
    return sd3(home, qk_norm="rms_norm", dual_attention_layers=(0,))


def sd3(home: Path, **more: Any) -> Any:
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
            **more,
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


def flux2(home: Path) -> Any:
    """FLUX.2 [klein] for samples of 4x4, in which 2x2 squares of latents are folded."""
    words = qwen_tokenizer()
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    torch.nn.init.normal_(autoencoder.bn.running_mean)
    torch.nn.init.uniform_(autoencoder.bn.running_var, 0.5, 2.0)
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=autoencoder,
        text_encoder=qwen3(words, 28, causal=True),
        tokenizer=words,
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            guidance_embeds=False,
            axes_dims_rope=(2, 2, 2, 2),
        ).eval(),
    )


def qwen_image(home: Path) -> Any:
    words = qwen_tokenizer()
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.5, 0.1, 0.3, -0.2],
            latents_std=[2.0, 1.5, 0.8, 1.1],
        ).eval(),
        text_encoder=qwen_vl(words),
        tokenizer=words,
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            axes_dims_rope=(2, 2, 4),
        ).eval(),
    )


def z_image(home: Path) -> Any:
    words = qwen_tokenizer()
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=qwen3(words, 2),
        tokenizer=words,
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=8,
            axes_dims=[4, 2, 2],
            axes_lens=[1024, 16, 16],
        ).eval(),
    )


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
    "sd_bert": sd_bert,
    "sd35": sd35,
    "flux2": flux2,
    "qwen_image": qwen_image,
    "z_image": z_image,
}
FLOWS = ("sd3", "sd35", "sana", "flux", "flux_guided", "flux2", "qwen_image", "z_image")
ANY_SIZE = {"flux": 8, "flux_guided": 8, "flux2": 4, "qwen_image": 8, "z_image": 8}
"""Those whose configuration names no size of its own -> the side that they are told here."""


def build(kind: str, home: Path, seed: int = 0) -> Path:
    """A saved pipeline folder of random weights, none of them zero."""
    torch.manual_seed(seed)
    pipe = KINDS[kind](home)
    net = getattr(pipe, "unet", None) or pipe.transformer
    for p in net.parameters():
        if not bool(p.any()):  # such as the output layers of a transformer
            torch.nn.init.normal_(p, std=0.1)
    pipe.save_pretrained(home / "pipe", safe_serialization=True)
    if kind in ANY_SIZE:
        path = home / "pipe" / "transformer" / "config.json"
        told = {**json.loads(path.read_text()), "sample_size": ANY_SIZE[kind]}
        path.write_text(json.dumps(told))
    return home / "pipe"
