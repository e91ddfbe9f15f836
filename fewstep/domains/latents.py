"""Latents as the domain of EDM2's recipes: the archive of ImageNet 512 that EDM2's tool makes.

fewstep distill sida_edm2_xs --domain "LatentMoments('img512-sd.zip')" ...
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fewstep.data.latents import LatentBatches, latents_of
from fewstep.diffusion.model import Model
from fewstep.diffusion.types import Source
from fewstep.domains.domain import Domain
from fewstep.domains.pictures import chosen_labels, noise, without_files
from fewstep.storage.files import require_unchanged


@dataclass(frozen=True)
class LatentMoments(Domain):
    """Means and deviations of latents on disk (`fewstep.data.latents`), for training."""

    places: ClassVar[tuple[str, ...]] = ("path",)
    path: str = ""
    """A .zip of latents; empty: none at hand, for data-free methods alone."""
    labels: bool = True
    """Whether labels are the latents' own; otherwise data-free methods draw them uniformly."""
    sha256: str = ""
    """Fingerprint of the set, recorded by the run; another one in its place is refused."""

    def settled(self) -> Domain:
        """With the fingerprint of the file, from the CRC-32 of its members."""
        if not self.path:
            return self
        fingerprint = latents_of(self.path).archive.fingerprint()
        return replace(self, sha256=require_unchanged(self.path, self.sha256, fingerprint))

    def source(self, model: Model, data_free: bool) -> Source:
        """Latents drawn from the stored moments; data-free: noise, with the labels of the set."""
        if not self.path:
            return without_files(self, model, data_free)
        latents = latents_of(self.path)
        labels = chosen_labels(latents.labels, self, model, data_free)
        if data_free:
            return noise(model, labels)
        if latents.shape != model.shape:
            raise ValueError(
                f"{self.path} holds latents of {latents.shape}, but the model is for {model.shape}"
            )
        return LatentBatches(latents, labels)
