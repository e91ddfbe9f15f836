"""CLIP from a local folder of transformers: pictures and texts as unit vectors of one space.

Radford et al. 2021, https://arxiv.org/abs/2103.00020. The CLIP score of a picture made for a
prompt is the cosine of their vectors (Hessel et al. 2021, https://arxiv.org/abs/2104.08718,
without the factor 2.5 and the cut at zero); it depends on the model, which is part of its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.eval.features import Features, PublishedFeatures, channels_first
from fewstep.storage.files import digest, read_json
from fewstep.teachers.diffusers.prompt_lengths import counted, sentence
from fewstep.training.progress import remark

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that CLIP was trained on; a folder's preprocessor_config.json may say others."""


TEXTS = 256
"""Texts that a network hears at once."""


class Aligned(Features, Protocol):
    """Features of pictures beside those of texts: unit vectors whose cosine is their alignment."""

    def text(self, prompts: Sequence[str]) -> Tensor:
        """N texts -> unit vectors (N, dim)."""


def text_vectors(aligned: Aligned, prompts: Sequence[str]) -> Tensor:
    """Unit vectors (N, dim) of any number of texts, in main memory; remarks on those that are cut.

    Raises what the network raises.
    """
    if isinstance(aligned, Clip):
        remark(aligned.lost(prompts))
    parts = range(0, len(prompts), TEXTS)
    return torch.cat([aligned.text(prompts[i : i + TEXTS]).cpu() for i in parts])


def alignment(pictures: Tensor, texts: Tensor) -> float:
    """Mean cosine of unit vectors (N, D) of pictures and of their prompts."""
    if pictures.shape != texts.shape:
        raise ValueError(
            f"{len(pictures)} pictures of {pictures.shape[1:]} for {len(texts)} texts of "
            f"{texts.shape[1:]}"
        )
    return float((pictures.double() * texts.double()).sum(1).mean())


class Clip(PublishedFeatures):
    """Pictures are brought to the model's size by antialiased bicubic interpolation of their
    shorter side, and cut to their middle square."""

    family, label = "clip", "clip"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sha256: str,
        moments: tuple[Sequence[float], Sequence[float]] = (MEAN, DEVIATION),
        device: torch.device | str = "cpu",
    ) -> None:
        """`model` is a CLIPModel, `tokenizer` its CLIPTokenizer."""
        super().__init__(sha256)
        self.dim: int = model.config.projection_dim
        self.side: int = model.config.vision_config.image_size
        self.longest: int = model.config.text_config.max_position_embeddings
        self.model = model.requires_grad_(False).eval().to(device)
        self.tokenizer, self.device = tokenizer, device
        self.mean, self.deviation = (
            torch.tensor(values, device=device)[:, None, None] for values in moments
        )

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, None]:
        x = middle(channels_first(pictures, self.device), self.side)
        x = (x / 255 - self.mean) / self.deviation
        pooled = self.model.vision_model(pixel_values=x).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=1), None

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Longer prompts are cut at the model's number of tokens, as CLIP itself cuts them."""
        tokens = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.longest,
            return_tensors="pt",
        ).to(self.device)
        pooled = self.model.text_model(**tokens).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=1)

    def lost(self, prompts: Sequence[str]) -> str:
        """A sentence on prompts that are cut, or ""."""
        return sentence(counted([self.tokenizer], [self.longest], prompts), "CLIP")


def middle(x: Tensor, side: int) -> Tensor:
    """Pictures (B, C, H, W), the shorter side brought to `side`, and the middle square of that."""
    height, width = x.shape[2:]
    short = min(height, width)
    size = height * side // short, width * side // short  # whole numbers from below, as CLIP's own
    if size != (height, width):
        x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return x[:, :, top : top + side, left : left + side]


def weights_of(folder: Path) -> Path:
    """The weights of the CLIP in `folder`; ValueError where it holds something else."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no folder of a CLIP of transformers: no config.json in it")
    facts = read_json(folder / "config.json")
    if not isinstance(facts, dict) or facts.get("model_type") != "clip":
        raise ValueError(f"{folder / 'config.json'} does not describe a CLIP")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{folder} holds no model.safetensors")
    return weights


def load_clip(folder: Path, device: torch.device | str = "cpu") -> Clip:
    """The CLIP in `folder`: config.json, model.safetensors and its tokenizer's files.

    ValueError where transformers is missing or the folder holds something else.
    """
    weights = weights_of(folder)
    try:
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.utils import logging
    except ImportError:
        raise ValueError(f"{folder}: CLIP needs transformers: pip install transformers") from None
    logging.disable_progress_bar()
    read: Any = CLIPModel.from_pretrained
    safely = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        model, loading = read(folder, **safely)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} is no usable CLIP: {str(error).splitlines()[0]}") from None
    if loading["missing_keys"]:
        raise ValueError(f"{weights} has no {sorted(loading['missing_keys'])[0]}")
    return Clip(model.float(), tokenizer, digest(weights), _moments(folder), device)


def _moments(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of pictures, as the folder says."""
    path = folder / "preprocessor_config.json"
    config = read_json(path) if path.is_file() else {}
    return config.get("image_mean", MEAN), config.get("image_std", DEVIATION)
