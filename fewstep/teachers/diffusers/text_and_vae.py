"""Text encoders and VAE of a pipeline folder, run by the code of the stock pipeline.

Prompts are turned into conditions by the pipeline's own `encode_prompt`, so that a student hears
exactly what it will hear when it is shipped. Both are loaded when first needed; text encoders
may be larger than the network, so `release` lets them go.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.teachers.diffusers import parts
from fewstep.teachers.diffusers.compatibility import longest, moments
from fewstep.teachers.diffusers.folder import NEVER_LOADED, PipelineFolder, first_line
from fewstep.teachers.diffusers.network import require_library

_AS_CALLED = ("max_sequence_length", "clean_caption", "complex_human_instruction")
"""Settings of encode_prompt that are left as a user's plain call has them."""


@dataclass
class TextAndVAE:
    """Text encoders and VAE of a folder in float32, loaded at first use."""

    folder: PipelineFolder
    device: torch.device | str = "cpu"
    _text: Any = None
    _vae: Any = None

    @property
    def kind(self) -> Any:
        """The class of the stock pipeline."""
        require_library("transformers")  # where it must be there, and be quiet
        return getattr(require_library("diffusers"), self.folder.pipeline)

    @property
    def tokens(self) -> int:
        """Number of tokens in the embedding of a prompt."""
        long = inspect.signature(self.kind.__call__).parameters.get("max_sequence_length")
        if long is not None and "text_encoder_3" not in self.folder.family.text:
            return int(long.default)  # all but SD3, which puts CLIP's words before T5's
        words = longest(self.folder, "tokenizer", parts.tokenizer(self.folder, "tokenizer"))
        return words + (int(long.default) if long is not None else 0)

    @property
    def scale(self) -> int:
        """Pixels along a side of one latent position."""
        kind = self.folder.vae_kind
        stages = len(self.folder.config("vae")[kind.stages])
        return int(2 ** (stages if kind.halvings else stages - 1)) * kind.folded

    def release(self) -> None:
        """Free the loaded text encoders and VAE."""
        self._text = self._vae = None

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode N prompts to a condition of (N, *) tensors."""
        return self._encoded(list(texts), "")

    @torch.no_grad()
    def null(self, negative: str = "") -> dict[str, Tensor]:
        """The condition of no prompt, as the pipeline's own guidance takes it: (1, *) tensors.

        negative: a prompt in its place, encoded as the pipeline's `negative_prompt`. Where the
        pipeline has no guidance of its own (FLUX), either is encoded as a prompt.
        """
        guides = any(name.startswith("-") for name in self.folder.family.encoded)
        if negative and guides:
            return self._encoded([negative], "-", {"negative_prompt": [negative]})
        return self._encoded([negative], "-")

    def _encoded(
        self, texts: list[str], sign: str, more: Mapping[str, Any] = {}
    ) -> dict[str, Tensor]:
        family, settings = self.folder.family, {**self.settings, **more}
        try:
            out = self._pipeline().encode_prompt(texts, device=self.device, **settings)
            named = dict(zip(family.encoded, out, strict=True))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{self.folder.path}: the code of a stock {self.folder.pipeline} cannot encode "
                f"prompts by these text encoders ({first_line(error)}); it is made for "
                f"{', '.join(family.text['text_encoder'])}"
            ) from None
        given = (name for name in family.tensors if name in named)
        signed = {name: named.get(sign + name, named[name]) for name in given}
        if family.own_lengths:
            return filled(signed["prompt"], signed.get("mask"), self.tokens)
        return {name: tensor.float() for name, tensor in signed.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of encode_prompt beside the prompts, as in a plain call of the pipeline."""
        call = inspect.signature(self.kind.__call__).parameters
        takes = inspect.signature(self.kind.encode_prompt).parameters
        more: dict[str, Any] = {key: call[key].default for key in _AS_CALLED if key in takes}
        more |= {key: 1 for key in ("num_images_per_prompt",) if key in takes}
        more |= {key: None for key in ("prompt_2", "prompt_3") if key in takes}
        if "do_classifier_free_guidance" in takes:
            more["do_classifier_free_guidance"] = True
        return more

    def _pipeline(self) -> Any:
        """The stock pipeline with its text encoders, and without network and VAE.

        Where an encoder is missing that may be, stock reads the width of its zeros in the
        network's configuration; then there is a network without weights.
        """
        if self._text is None:
            folder, network = self.folder, None
            if folder.left_out:
                name, kind = folder.family.network, folder.family.network_class
                network = parts.built(kind, folder.config(name), folder.path / name, meta=True)
            self._text = self._made({folder.family.network: network, "vae": None})
        return self._text

    def pipeline(self, network: Any) -> Any:
        """The stock pipeline of the folder, with `network` in place of its own."""
        return self._made({self.folder.family.network: network, "vae": self.vae})

    def _made(self, given: dict[str, Any]) -> Any:
        """The stock pipeline with these parts, and text encoders of the folder.

        All weights are read here, so that stock looks for no files of its own.
        """
        takes = inspect.signature(self.kind.__init__).parameters
        given |= {part: None for part in (*NEVER_LOADED, *self.folder.left_out) if part in takes}
        for part in self.folder.encoders:
            given[part] = parts.text_encoder(self.folder, part).to(self.device)
        return self.kind.from_pretrained(self.folder.path, local_files_only=True, **given)

    @property
    def vae(self) -> Any:
        """The VAE."""
        if self._vae is None:
            self._vae = parts.vae(self.folder).to(self.device)
        return self._vae

    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, C, h, w) -> pictures (N, 3, H, W) in about [-1, 1], with their gradient."""
        z = z.to(self.vae.device)
        z = self.unscaled(z)
        frames = self.folder.vae_kind.frames
        out: Tensor = self.vae.decode(z[:, :, None] if frames else z, return_dict=False)[0]
        return out[:, :, 0] if frames else out

    def unscaled(self, z: Tensor) -> Tensor:
        """Latents (N, C, h, w) -> the VAE's own."""
        mean, std = self._affine(z)
        return F.pixel_shuffle(z * std + mean, self.folder.vae_kind.folded)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] -> the means of their latents (N, C, h, w)."""
        x = x.to(self.vae.device)
        kind = self.folder.vae_kind
        posterior = self.vae.encode(x[:, :, None] if kind.frames else x, return_dict=False)[0]
        mean, std = self._affine(x)
        z: Tensor = posterior if isinstance(posterior, Tensor) else posterior.mode()
        return (F.pixel_unshuffle(z[:, :, 0] if kind.frames else z, kind.folded) - mean) / std

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's own latents, in place of x_0's."""
        mean, std = (torch.tensor(values).to(like) for values in moments(self.folder))
        return mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)


def filled(
    prompt: Tensor | Sequence[Tensor], mask: Tensor | None, tokens: int
) -> dict[str, Tensor]:
    """Prompts of their own lengths as "prompt" (N, tokens, D), with zeros, and "mask" (N, tokens).

    prompt: N tensors (L, D), or (N, L, D) whose words are where `mask` (N, L) says, or all.
    """
    rows = [row if mask is None else row[mask[i].bool()] for i, row in enumerate(prompt)]
    words = rows[0].new_zeros(len(rows), tokens, rows[0].shape[-1], dtype=torch.float32)
    there = words.new_zeros(len(rows), tokens)
    for i, row in enumerate(rows):
        words[i, : len(row)], there[i, : len(row)] = row.float(), 1.0
    return {"prompt": words, "mask": there}
