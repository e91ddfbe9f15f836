"""Stable Diffusion's autoencoder between EDM2's latents and pictures, from a local folder.

    student, _ = as_pictures(open_model("runs/edm2"), "sd-vae-ft-mse")
    student.sample(range(4))        # (4, 3, 512, 512) in [-1, 1]

The folder is one of diffusers' AutoencoderKL: config.json and safetensors; nothing is downloaded,
nothing unpickled. EDM2 (https://arxiv.org/abs/2312.02696) gives it pictures in [0, 1], where
Stable Diffusion itself has [-1, 1]: the statistics of its latents are of those.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.latents import MEAN, restored, standardised
from fewstep.diffusion.generator import Generator
from fewstep.storage.files import digest, read_json
from fewstep.storage.safetensors_header import header

VARIABLE = "FEWSTEP_VAE"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PART = 8
"""Pictures that are decoded at once: each takes gigabytes."""


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """A VAE between latents x0 (B, 4, H, W) and pictures (B, 3, 8 H, 8 W) in [-1, 1]."""

    vae: Any
    """An AutoencoderKL of diffusers."""
    sha256: str
    """Of its weights."""

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Pictures (B, 3, 8 H, 8 W) in [-1, 1] of standardised latents (B, 4, H, W)."""
        parts = [self.vae.decode(part).sample for part in restored(x0).split(PART)]
        return 2 * torch.cat(parts).clamp(0, 1) - 1

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Standardised posterior means (B, 4, H, W) of pictures (B, 3, 8 H, 8 W) in [-1, 1]."""
        parts = (pictures / 2 + 0.5).split(PART)
        latents = torch.cat([self.vae.encode(part).latent_dist.mean for part in parts])
        return standardised(latents)


def load_autoencoder(folder: Path, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder in `folder`; ValueError where diffusers is missing, or it holds another."""
    facts = read_json(folder / "config.json")
    if not isinstance(facts, dict) or facts.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"{folder / 'config.json'} does not describe an AutoencoderKL")
    channels = facts.get("latent_channels", 4)  # the default of the class
    if channels != len(MEAN):
        raise ValueError(f"{folder} has latents of {channels} channels; EDM2's have 4")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS}")
    header(folder / WEIGHTS)
    if (folder / f"{WEIGHTS}.index.json").is_file():
        raise ValueError(
            f"{folder} holds an index of shards beside {WEIGHTS}, and diffusers reads the shards; "
            "keep one of them"
        )
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ValueError(
            f"{folder}: latents are decoded by diffusers; install it with: pip install diffusers"
        ) from None
    try:
        vae, loading = AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} is no usable autoencoder: {_first_line(error)}") from None
    wrong = sorted(loading["missing_keys"]) + sorted(loading["unexpected_keys"])
    if wrong:
        raise ValueError(f"{folder / WEIGHTS} is not of its config.json: {wrong[0]}")
    return Autoencoder(
        vae.float().eval().requires_grad_(False).to(device), digest(folder / WEIGHTS)
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def are_latents(shape: tuple[int, ...]) -> bool:
    """Whether samples of that shape are taken for latents of Stable Diffusion's autoencoder."""
    return len(shape) == 3 and shape[0] == len(MEAN)


def as_pictures(generator: Generator, folder: str = "") -> tuple[Generator, str]:
    """`generator` with its latents decoded, and the SHA-256 of what decodes them.

    The autoencoder is that in `folder`, or in what FEWSTEP_VAE names; a ValueError says so where
    there is none. A model of pictures stays as it is, with "".
    """
    if not are_latents(generator.shape):
        if folder:
            raise ValueError(f"this model makes {generator.shape}, no latents: leave out --vae")
        return generator, ""
    folder = folder or os.environ.get(VARIABLE, "")
    if not folder:
        raise ValueError(
            f"this model makes latents {generator.shape}: pass --vae FOLDER, or set {VARIABLE}, "
            "to decode them; docs/evaluation.md tells where to get one (sample and serve take "
            "--vae none, for latents as they are)"
        )
    autoencoder = load_autoencoder(Path(folder), generator.device)
    return replace(
        generator, decode=autoencoder.decode, encode=autoencoder.encode
    ), autoencoder.sha256
