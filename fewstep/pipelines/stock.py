"""What a folder brings beside its network: text encoders and VAE, by the stock pipeline's code.

Prompts are turned into conditions by the pipeline's own `encode_prompt`, so that a student hears
exactly what it will hear when it is shipped. Both are loaded when first needed; text encoders
may be larger than the network, so `release` lets them go.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.files import read_json
from fewstep.pipelines.folder import NEVER_LOADED, PipelineFolder
from fewstep.pipelines.net import library

_AS_CALLED = ("max_sequence_length", "clean_caption", "complex_human_instruction")
"""Settings of encode_prompt that are left as a user's plain call has them."""


@dataclass
class Stock:
    """Text encoders and VAE of a folder, float32."""

    folder: PipelineFolder
    device: torch.device | str = "cpu"
    _text: Any = None
    _vae: Any = None

    @property
    def kind(self) -> Any:
        """The class of the stock pipeline."""
        library("transformers")  # where it must be there, and be quiet
        return getattr(library("diffusers"), self.folder.pipeline)

    @property
    def tokens(self) -> int:
        """Length of a prompt's embedding."""
        long = inspect.signature(self.kind.__call__).parameters.get("max_sequence_length")
        if long is not None and "text_encoder_3" not in self.folder.family.text:
            return int(long.default)  # all but SD3, which puts CLIP's words before T5's
        where = self.folder.path / "tokenizer" / "tokenizer_config.json"
        words = read_json(where).get("model_max_length")
        if not isinstance(words, int) or not 1 <= words <= 10_000:
            raise ValueError(f"{where}: model_max_length should be 1 to 10000, got {words}")
        return words + (int(long.default) if long is not None else 0)

    @property
    def scale(self) -> int:
        """Pixels a side of one place of the latent."""
        config = self.folder.config("vae")
        blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        return int(2 ** (len(blocks or ()) - 1))

    def release(self) -> None:
        """Let go of what was loaded."""
        self._text = self._vae = None

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """A condition of (N, *) tensors for N prompts."""
        return self._encoded(list(texts), "")

    @torch.no_grad()
    def null(self) -> dict[str, Tensor]:
        """The condition of no prompt, as the pipeline's own guidance takes it: (1, *) tensors.

        Where the pipeline has none of its own (FLUX), that of the empty prompt.
        """
        return self._encoded([""], "-")

    def _encoded(self, texts: list[str], sign: str) -> dict[str, Tensor]:
        more = {"num_images_per_prompt": 1, **self.settings}
        out = self._pipeline().encode_prompt(prompt=texts, device=self.device, **more)
        named = dict(zip(self.folder.family.encoded, out, strict=True))
        signed = {name: named.get(sign + name, named[name]) for name in self.folder.family.tensors}
        return {name: tensor.float() for name, tensor in signed.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """What encode_prompt is told beside the prompts, as a plain call of the pipeline does."""
        call = inspect.signature(self.kind.__call__).parameters
        takes = inspect.signature(self.kind.encode_prompt).parameters
        more: dict[str, Any] = {key: call[key].default for key in _AS_CALLED if key in takes}
        more |= {key: None for key in ("prompt_2", "prompt_3") if key in takes}
        if "do_classifier_free_guidance" in takes:
            more["do_classifier_free_guidance"] = True
        return more

    def _pipeline(self) -> Any:
        """The stock pipeline with its text encoders, and without network and VAE."""
        if self._text is None:
            without = {self.folder.family.network: None, "vae": None}
            self._text = self.pipeline(**without).to(self.device)
        return self._text

    def pipeline(self, **parts: Any) -> Any:
        """The stock pipeline of the folder, with `parts` in place of its own."""
        takes = inspect.signature(self.kind.__init__).parameters
        parts |= {part: None for part in NEVER_LOADED if part in takes}
        return self.kind.from_pretrained(self.folder.path, **self._safely, **parts)

    @property
    def vae(self) -> Any:
        """The VAE."""
        if self._vae is None:
            cls = getattr(library("diffusers"), self.folder.parts["vae"])
            self._vae = cls.from_pretrained(self.folder.path / "vae", **self._safely)
            self._vae.requires_grad_(False).eval().to(self.device)
        return self._vae

    @property
    def _safely(self) -> dict[str, Any]:
        return {
            "dtype": torch.float32,
            "use_safetensors": True,
            "local_files_only": True,
            "variant": self.folder.variant,
        }

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, C, h, w) -> pictures (N, 3, H, W) in about [-1, 1]."""
        z = z.to(self.vae.device)
        mean, std = self._affine(z)
        out: Tensor = self.vae.decode(z * std + mean, return_dict=False)[0]
        return out

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] -> the means of their latents (N, C, h, w)."""
        x = x.to(self.vae.device)
        found = self.vae.encode(x, return_dict=False)[0]
        mean, std = self._affine(x)
        z: Tensor = found if isinstance(found, Tensor) else found.mode()
        return (z - mean) / std

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's own latents, in place of x_0's."""
        config = self.folder.config("vae")
        scale = float(config.get("scaling_factor") or 1.0)
        shift = config.get("shift_factor") or 0.0
        mean, std = config.get("latents_mean") or [shift], config.get("latents_std") or [1.0]
        shape = (1, -1, 1, 1)
        return (
            torch.tensor(mean).reshape(shape).to(like),
            torch.tensor(std).reshape(shape).to(like) / scale,
        )
