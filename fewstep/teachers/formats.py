"""The kinds of file and folder that hold a teacher: one `TeacherFormat` each.

    format_of("stable-diffusion-v1-5").load("stable-diffusion-v1-5")

A new kind is a class here and an entry of `FORMATS`; whoever opens, describes, inspects or digests
a teacher asks its format, and names none.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

import torch

from fewstep.config import encode
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.storage.files import digest
from fewstep.storage.model_folder import (
    load_student,
    model_description,
    stored_card,
    weights_digest,
)
from fewstep.teachers import snapshots
from fewstep.teachers.diffusers.folder import is_pipeline, open_folder, refuse_single_file
from fewstep.teachers.diffusers.load import describe_network, load_pipeline, pipeline_card
from fewstep.teachers.facts import Facts, of_file, of_model, of_pipeline


class TeacherFormat(ABC):
    """How one kind of teacher is found, opened, described and told apart from others."""

    @abstractmethod
    def matches(self, path: Path | str) -> bool:
        """Whether what is at `path` is of this kind, as far as a glance can tell."""

    @abstractmethod
    def load(self, path: Path | str, device: torch.device | str) -> Generator:
        """The generator, on `device`; ValueError where it cannot be read."""

    @abstractmethod
    def describe(self, path: Path | str) -> Model:
        """The `Model` of what `load` gives, found without reading a weight's value."""

    @abstractmethod
    def weights_digest(self, path: Path | str) -> str:
        """SHA-256 over the weights that `load` reads."""

    def further_digests(self, path: Path | str) -> dict[str, str]:
        """SHA-256 of what it computes with beside its weights: its "text" encoders, its "vae"."""
        return {}

    def unread(self, path: Path | str) -> list[str]:
        """Names of weights that lie beside those that are read."""
        return []

    def facts(self, path: Path | str) -> Facts:
        """What `fewstep inspect` tells of it: "what" it is, and whatever else is known of it.

        JSON values, tuples, or tensors' types by name; by default the answers of this class.
        """
        return {
            "what": f"teacher of the kind {type(self).__name__}",
            "path": str(path),
            "model": encode(self.describe(path)),
            "sha256 of the weights": self.weights_digest(path),
            **{f"sha256 of {name}": sha for name, sha in self.further_digests(path).items()},
            "not read": self.unread(path),
        }


class Pipelines(TeacherFormat):
    """A folder of a diffusers pipeline."""

    def matches(self, path: Path | str) -> bool:
        """A folder with model_index.json."""
        return is_pipeline(path)

    def load(self, path: Path | str, device: torch.device | str) -> Generator:
        """Network, schedule, text encoders and VAE."""
        return load_pipeline(path, device)

    def describe(self, path: Path | str) -> Model:
        """From configurations and headers."""
        return describe_network(open_folder(path))

    def weights_digest(self, path: Path | str) -> str:
        """Over names and digests of the network's files."""
        files = (f"{file.name} {digest(file)}" for file in open_folder(path).weights())
        return hashlib.sha256("\n".join(files).encode()).hexdigest()

    def further_digests(self, path: Path | str) -> dict[str, str]:
        """Of text encoders and VAE."""
        folder = open_folder(path)
        return {"text": folder.text_digest, "vae": folder.vae_digest}

    def unread(self, path: Path | str) -> list[str]:
        """Weights that stock diffusers does not read either."""
        return open_folder(path).unread

    def facts(self, path: Path | str) -> Facts:
        """Its parts, their files, and what fewstep takes of it, or why not."""
        return of_pipeline(Path(path))


class Snapshots(TeacherFormat):
    """A snapshot of EDM, EDM2, SiD or SiDA."""

    def matches(self, path: Path | str) -> bool:
        """A file."""
        return Path(path).is_file()

    def load(self, path: Path | str, device: torch.device | str) -> Generator:
        """Read as data; nothing of it is executed."""
        refuse_single_file(path)
        return snapshots.load_snapshot(path, device=device)

    def describe(self, path: Path | str) -> Model:
        """From what the file says of its network."""
        refuse_single_file(path)
        return snapshots.stored_description(path)

    def weights_digest(self, path: Path | str) -> str:
        """Of the file."""
        return digest(Path(path))

    def facts(self, path: Path | str) -> Facts:
        """Its objects, tensors and settings; of a safetensors file, which is none, its header."""
        return of_file(Path(path))


class ModelFolders(TeacherFormat):
    """A model or run folder of fewstep; what is none is refused by it."""

    def matches(self, path: Path | str) -> bool:
        """Whatever no other format takes."""
        return True

    def load(self, path: Path | str, device: torch.device | str) -> Generator:
        """The finished model."""
        return load_student(path, device)

    def describe(self, path: Path | str) -> Model:
        """From model.json."""
        return model_description(path)

    def weights_digest(self, path: Path | str) -> str:
        """As its manifest has it."""
        return weights_digest(path)

    def further_digests(self, path: Path | str) -> dict[str, str]:
        """Of the text encoders and VAE of the pipeline that it was distilled from, if any."""
        card = pipeline_card(stored_card(path))
        return {key: str(card[key]) for key in ("text", "vae") if key in card}

    def facts(self, path: Path | str) -> Facts:
        """Its description and files; of a checkpoint, which is none, its counters."""
        return of_model(Path(path))


FORMATS: tuple[TeacherFormat, ...] = (Pipelines(), Snapshots(), ModelFolders())
"""In the order in which they are asked."""


def format_of(path: Path | str) -> TeacherFormat:
    """The format of what is at `path`: the first that matches."""
    return next(one for one in FORMATS if one.matches(path))
