"""Arrays of numbers of any shape as the domain of any recipe: signals, fields, volumes, films.

fewstep train digits_teacher --domain "Arrays('signals.npz')" --model.shape 2 64 ...
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fewstep.data import npz
from fewstep.data.batches import Images
from fewstep.data.zip_archive import ZipArchive
from fewstep.diffusion.model import Model
from fewstep.diffusion.types import Source
from fewstep.domains.domain import Domain
from fewstep.domains.pictures import chosen_labels, noise, without_files
from fewstep.storage.files import require_unchanged


@dataclass(frozen=True)
class Arrays(Domain):
    """Arrays in an .npz file, for training. There is no measure of how good samples of them are.

    They are trained on as they are: bring them to a spread of about one half to one, and tell it
    to the model (`Model.sigma_data`).
    """

    places: ClassVar[tuple[str, ...]] = ("path",)
    decodes: ClassVar[bool] = False
    path: str = ""
    """An .npz with floats `x` (N, *), and if there integers `labels` (N,); empty: none at hand."""
    labels: bool = True
    """Whether labels are the arrays' own; otherwise data-free methods draw them uniformly."""
    sha256: str = ""
    """Fingerprint of the set, recorded by the run; another one in its place is refused."""

    def settled(self) -> Domain:
        """With the fingerprint of the file, from the CRC-32 of its members."""
        if not self.path:
            return self
        fingerprint = npz.opened(self.path).fingerprint()
        return replace(self, sha256=require_unchanged(self.path, self.sha256, fingerprint))

    def source(self, model: Model, data_free: bool) -> Source:
        """The arrays, shuffled; data-free: noise, with the labels of the set."""
        if not self.path:
            return without_files(self, model, data_free)
        archive: ZipArchive = npz.opened(self.path)
        count, *shape = npz.float_shape(archive, "x")
        labels = chosen_labels(npz.labels(archive, count), self, model, data_free)
        if data_free:
            return noise(model, labels)
        if tuple(shape) != model.shape:
            raise ValueError(
                f"{self.path} holds arrays of {tuple(shape)}, but the model is for {model.shape}; "
                f"say --model.shape {' '.join(map(str, shape))}"
            )
        return Images(npz.floats(archive, "x"), labels)
