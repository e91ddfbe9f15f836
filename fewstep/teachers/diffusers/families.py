"""The supported pipelines: a table that is also the allow-list of classes.

A folder names the classes of its parts. Networks, VAEs and schedulers are looked up here and
nowhere else; a class that does not stand here is refused, whoever wrote it. Text encoders and
tokenizers are classes of transformers, those named here or any others (`is_text_class`).

    StableDiffusionPipeline      Rombach et al. 2022   https://arxiv.org/abs/2112.10752
    StableDiffusionXLPipeline    Podell et al. 2023    https://arxiv.org/abs/2307.01952
    StableDiffusion3Pipeline     Esser et al. 2024     https://arxiv.org/abs/2403.03206
    PixArtAlphaPipeline          Chen et al. 2023      https://arxiv.org/abs/2310.00426
    PixArtSigmaPipeline          Chen et al. 2024      https://arxiv.org/abs/2403.04692
    SanaPipeline                 Xie et al. 2024       https://arxiv.org/abs/2410.10629
    FluxPipeline                 Black Forest Labs     https://github.com/black-forest-labs/flux
    Flux2KleinPipeline           Black Forest Labs     https://github.com/black-forest-labs/flux2
    QwenImagePipeline            Wu et al. 2025        https://arxiv.org/abs/2508.02324
    ZImagePipeline               Cai et al. 2025       https://arxiv.org/abs/2511.22699
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fewstep.teachers.diffusers.network import require_library

Classes = Mapping[str, tuple[str, ...]]
"""Part of a pipeline -> the names of the classes it usually has."""

_CLIP = ("CLIPTextModel",)
_BIG_CLIP = ("CLIPTextModelWithProjection",)
_T5 = ("T5EncoderModel",)
_GEMMA = ("Gemma2Model", "Gemma2ForCausalLM")
_CLIP_WORDS = ("CLIPTokenizer", "CLIPTokenizerFast")
_T5_WORDS = ("T5Tokenizer", "T5TokenizerFast")
_GEMMA_WORDS = ("GemmaTokenizer", "GemmaTokenizerFast")
_QWEN_WORDS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
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
class VAEKind:
    """What a class of autoencoders calls its own numbers."""

    channels: str = "latent_channels"
    """Key of the number of channels of its latents."""
    colours: str = "in_channels"
    """Key of the number of channels of its pictures."""
    stages: str = "block_out_channels"
    """Key of a list with an entry for each of its resolutions, or for each halving."""
    halvings: bool = False
    """Whether that list has no entry for the full resolution."""
    folded: int = 1
    """Side of the squares of its latents that the pipeline folds into channels."""
    frames: bool = False
    """Whether it is one of films, and pictures are films of one frame."""
    normalised: bool = False
    """Whether the statistics of its folded latents are those of its layer `bn`."""


VAES: Mapping[str, VAEKind] = {
    "AutoencoderKL": VAEKind(),
    "AutoencoderDC": VAEKind(stages="encoder_block_out_channels"),
    "AutoencoderKLQwenImage": VAEKind(
        "z_dim", "input_channels", "temperal_downsample", halvings=True, frames=True
    ),
    "AutoencoderKLFlux2": VAEKind(folded=2, normalised=True),
}
"""How each class of autoencoder is read."""


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
    own_lengths: bool = False
    """Whether encode_prompt gives each prompt, or each call, a length of its own."""
    layers: int = 1
    """Layers of its text encoder that stand side by side in a prompt."""
    template: int = 0
    """Tokens that its chat template adds to a prompt, and its length counts."""
    shift: Literal["line", "steps"] = "line"
    """How its pipeline shifts times where its scheduler leaves that to it: by a line in the number
    of tokens, or by a formula in that and the number of steps."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors of a condition."""
        names = tuple(name for name in self.encoded if name and name[0] != "-")
        return (*names, "mask") if self.own_lengths and "mask" not in names else names


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
    "Flux2KleinPipeline": Family(
        "transformer",
        "Flux2Transformer2DModel",
        {"text_encoder": ("Qwen3ForCausalLM", "Qwen3Model"), "tokenizer": _QWEN_WORDS},
        vae=("AutoencoderKLFlux2",),
        encoded=("prompt", ""),
        widths={"prompt": ("text_encoder",)},
        vae_keys=(),
        layers=3,
        template=12,
        shift="steps",
    ),
    "QwenImagePipeline": Family(
        "transformer",
        "QwenImageTransformer2DModel",
        {"text_encoder": ("Qwen2_5_VLForConditionalGeneration",), "tokenizer": _QWEN_WORDS},
        vae=("AutoencoderKLQwenImage",),
        encoded=("prompt", "mask"),
        widths={"prompt": ("text_encoder",)},
        vae_keys=("latents_mean", "latents_std"),
        own_lengths=True,
        template=5,
    ),
    "ZImagePipeline": Family(
        "transformer",
        "ZImageTransformer2DModel",
        {"text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"), "tokenizer": _QWEN_WORDS},
        encoded=("prompt", "-prompt"),
        widths={"prompt": ("text_encoder",)},
        vae_keys=("scaling_factor", "shift_factor"),
        own_lengths=True,
        template=8,
    ),
}


def is_text_class(name: str, part: str) -> bool:
    """Whether transformers has a text encoder, or a tokenizer, whose class has this name.

    Its own classes alone: what a folder brings as code is refused elsewhere.
    """
    library = require_library("transformers")
    base = library.PreTrainedTokenizerBase if _words(part) else library.PreTrainedModel
    try:
        found = getattr(library, name) if name.isidentifier() else None
    except (AttributeError, ImportError, RuntimeError):  # of classes that need more libraries
        return False
    return isinstance(found, type) and issubclass(found, base)


def _words(part: str) -> bool:
    return part.startswith("tokenizer")
