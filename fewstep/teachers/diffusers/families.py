"""The supported pipelines: a table that is also the allow-list of classes.

A folder names the classes of its parts. They are looked up here and nowhere else; a class that
does not stand here is refused, whoever wrote it.

    StableDiffusionPipeline      Rombach et al. 2022   https://arxiv.org/abs/2112.10752
    StableDiffusionXLPipeline    Podell et al. 2023    https://arxiv.org/abs/2307.01952
    StableDiffusion3Pipeline     Esser et al. 2024     https://arxiv.org/abs/2403.03206
    PixArtAlphaPipeline          Chen et al. 2023      https://arxiv.org/abs/2310.00426
    PixArtSigmaPipeline          Chen et al. 2024      https://arxiv.org/abs/2403.04692
    SanaPipeline                 Xie et al. 2024       https://arxiv.org/abs/2410.10629
    FluxPipeline                 Black Forest Labs     https://github.com/black-forest-labs/flux
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Classes = Mapping[str, tuple[str, ...]]
"""Part of a pipeline -> the names of the classes it may have."""

_CLIP = ("CLIPTextModel",)
_BIG_CLIP = ("CLIPTextModelWithProjection",)
_T5 = ("T5EncoderModel",)
_GEMMA = ("Gemma2Model", "Gemma2ForCausalLM")
_CLIP_WORDS = ("CLIPTokenizer", "CLIPTokenizerFast")
_T5_WORDS = ("T5Tokenizer", "T5TokenizerFast")
_GEMMA_WORDS = ("GemmaTokenizer", "GemmaTokenizerFast")
_VAE = ("AutoencoderKL",)


SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "TCDScheduler"),
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
)
"""Schedulers whose configuration says what the network was trained with."""


@dataclass(frozen=True)
class Family:
    """One supported kind of pipeline."""

    network: str
    """The name of its part that denoises."""
    network_class: str
    """The class that is built."""
    text: Classes
    """The parts that turn prompts into conditions."""
    vae: tuple[str, ...] = _VAE
    encoded: tuple[str, ...] = ("prompt", "-prompt")
    """What encode_prompt returns, in order: a condition's tensors, "-" before the null one's, and
    "" for what is no part of it."""
    optional: tuple[str, ...] = ()
    """Text parts that may be missing."""
    older: tuple[str, ...] = ()
    """Names that published folders have for the network's class."""
    widths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensor of a condition -> the text encoders whose widths, added up, are its own."""
    padded: tuple[str, ...] = ()
    """Text encoders whose words, side by side, are filled up with zeros to the prompt's width."""
    vae_keys: tuple[str, ...] = ("scaling_factor",)
    """What its stock pipeline reads of the VAE's configuration to scale latents."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors of a condition."""
        return tuple(name for name in self.encoded if name and name[0] != "-")


FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": Family(
        "unet",
        "UNet2DConditionModel",
        {"text_encoder": _CLIP, "tokenizer": _CLIP_WORDS},
        widths={"prompt": ("text_encoder",)},
    ),
    "StableDiffusionXLPipeline": Family(
        "unet",
        "UNet2DConditionModel",
        {
            "text_encoder": _CLIP,
            "text_encoder_2": _BIG_CLIP,
            "tokenizer": _CLIP_WORDS,
            "tokenizer_2": _CLIP_WORDS,
        },
        encoded=("prompt", "-prompt", "pooled", "-pooled"),
        widths={"prompt": ("text_encoder", "text_encoder_2"), "pooled": ("text_encoder_2",)},
        vae_keys=("scaling_factor", "latents_mean", "latents_std"),
    ),
    "StableDiffusion3Pipeline": Family(
        "transformer",
        "SD3Transformer2DModel",
        {
            "text_encoder": _BIG_CLIP,
            "text_encoder_2": _BIG_CLIP,
            "text_encoder_3": _T5,
            "tokenizer": _CLIP_WORDS,
            "tokenizer_2": _CLIP_WORDS,
            "tokenizer_3": _T5_WORDS,
        },
        encoded=("prompt", "-prompt", "pooled", "-pooled"),
        optional=("text_encoder_3", "tokenizer_3"),
        widths={"prompt": ("text_encoder_3",), "pooled": ("text_encoder", "text_encoder_2")},
        padded=("text_encoder", "text_encoder_2"),
        vae_keys=("scaling_factor", "shift_factor"),
    ),
    **dict.fromkeys(
        ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        Family(
            "transformer",
            "PixArtTransformer2DModel",
            {"text_encoder": _T5, "tokenizer": _T5_WORDS},
            encoded=("prompt", "mask", "-prompt", "-mask"),
            older=("Transformer2DModel",),
            widths={"prompt": ("text_encoder",)},
        ),
    ),
    "SanaPipeline": Family(
        "transformer",
        "SanaTransformer2DModel",
        {"text_encoder": _GEMMA, "tokenizer": _GEMMA_WORDS},
        vae=("AutoencoderDC",),
        encoded=("prompt", "mask", "-prompt", "-mask"),
        widths={"prompt": ("text_encoder",)},
    ),
    "FluxPipeline": Family(
        "transformer",
        "FluxTransformer2DModel",
        {
            "text_encoder": _CLIP,
            "text_encoder_2": _T5,
            "tokenizer": _CLIP_WORDS,
            "tokenizer_2": _T5_WORDS,
        },
        encoded=("prompt", "pooled", ""),
        widths={"prompt": ("text_encoder_2",), "pooled": ("text_encoder",)},
        vae_keys=("scaling_factor", "shift_factor"),
    ),
}
