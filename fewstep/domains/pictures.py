"""Your own pictures as the domain of any recipe: a folder, a zip file or an .npz.

fewstep train digits_teacher --domain "Pictures('my.zip', flip=True)" ...
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from torch import Tensor

from fewstep.data.batches import Latents
from fewstep.data.picture_set import (
    LabelsAlone,
    Shuffled,
    first_shape,
    load_pictures,
    spread_labels,
)
from fewstep.data.readers import Reader, reader_of
from fewstep.diffusion.model import Model
from fewstep.diffusion.types import Source
from fewstep.domains.domain import Domain
from fewstep.storage.files import require_unchanged
from fewstep.training.progress import remark


@dataclass(frozen=True)
class Pictures(Domain):
    """Pictures on disk, for training. There is no measure of how good samples of them are."""

    places: ClassVar[tuple[str, ...]] = ("path",)
    path: str = ""
    """A folder, .zip or .npz; empty: none at hand, for data-free methods alone."""
    resolution: int = 0
    """Side in pixels to which pictures are resized, cut to their middle square; 0: as they are."""
    flip: bool = False
    """Mirror each picture half of the time."""
    labels: bool = True
    """Whether labels are the pictures' own; otherwise data-free methods draw them uniformly."""
    max_items: int = 0
    """Use that many, evenly spread over the set; 0: all."""
    sha256: str = ""
    """Fingerprint of the set, recorded by the run; another one in its place is refused."""

    def __post_init__(self) -> None:
        if self.resolution < 0 or self.max_items < 0:
            raise ValueError(f"Pictures needs resolution and max_items of 0 or more, got {self}")

    def settled(self) -> Domain:
        """With the fingerprint of the set: names and sizes in a folder, or CRC-32 in a file."""
        if not self.path:
            return self
        fingerprint = reader_of(self.path).fingerprint()
        return replace(self, sha256=require_unchanged(self.path, self.sha256, fingerprint))

    def source(self, model: Model, data_free: bool) -> Source:
        """The pictures, shuffled; data-free: noise, with the labels of the set."""
        if not self.path:
            return without_files(self, model, data_free)
        reader = reader_of(self.path)
        rows = spread_labels(self.max_items, len(reader))
        labels = chosen_labels(reader.labels, self, model, data_free)
        if data_free:
            remark(*(f"{self.path}: {line}" for line in reader.notes.lines()))
            return noise(model, None if labels is None else labels[rows])
        self._same_shape(reader, model)
        pictures = load_pictures(reader, rows, model.shape, self.resolution)
        remark(*(f"{self.path}: {line}" for line in reader.notes.lines()))
        return Shuffled(pictures, None if labels is None else labels[rows], self.flip)

    def _same_shape(self, reader: Reader, model: Model) -> None:
        """Refuse a set of another shape at its first picture, before all are read."""
        if len(model.shape) != 3 or model.shape[0] not in (1, 3):
            raise ValueError(f"pictures are (1 or 3, H, W), got Model.shape {model.shape}")
        if self.resolution:
            if model.shape[1:] != (self.resolution, self.resolution):
                raise ValueError(
                    f"Pictures.resolution is {self.resolution}, but Model.shape {model.shape}"
                )
            return
        try:
            shape = first_shape(reader)
        except ValueError:
            return  # it will be named with all the others
        if shape != model.shape:
            raise ValueError(
                f"{self.path} holds pictures of {shape}, but the model is for {model.shape}; "
                "Pictures(resolution=...) resizes them, 'fewstep data pack' does so once"
            )


class Labelled(Protocol):
    """A domain whose labels come from its files."""

    @property
    def path(self) -> str:
        """Path of the data; "" for none."""

    @property
    def labels(self) -> bool:
        """Whether labels are read from the data."""


def without_files(domain: Labelled, model: Model, data_free: bool) -> Source:
    """The source of a domain that names no file: noise; ValueError where data are needed."""
    if not data_free:
        kind = type(domain).__name__
        raise ValueError(f"this method learns from data: say --domain \"{kind}('PATH')\"")
    return noise(model, None)


def noise(model: Model, labels: Tensor | None) -> Source:
    """Noise, with labels in the order of `labels`, or drawn uniformly."""
    if labels is None:
        return Latents(model.shape, model.classes)
    return LabelsAlone(model.shape, labels)


def chosen_labels(
    found: Tensor | None, domain: Labelled, model: Model, data_free: bool
) -> Tensor | None:
    """The labels that the model is conditioned on, None if it takes none.

    Arguments:
        found: labels (N,) of the files, None if they have none.
        domain: says whether these are used.
        model: its `classes` bound the labels.
        data_free: whether labels may be drawn uniformly instead.
    Raises ValueError where labels are missing or too large.
    """
    if not model.classes or (data_free and not domain.labels):
        return None
    if found is None or not domain.labels:
        kind = type(domain).__name__
        hint = f"; {kind}(labels=False) draws them uniformly" if data_free else ""
        why = "has no labels" if domain.labels else "is used without its labels"
        raise ValueError(
            f"{domain.path} {why}, but the model has {model.classes} classes{hint}; "
            "--model.classes 0 is for a model without"
        )
    top = int(found.max())
    if top >= model.classes:
        raise ValueError(
            f"{domain.path} has labels up to {top}, but the model has {model.classes} classes"
        )
    return found
