"""Pictures with captions: a folder with a metadata.jsonl, as the Hugging Face tools have it.

    metadata.jsonl    {"file_name": "cats/0001.png", "text": "a cat on a red chair"}
                      a line a picture; "prompt", "caption" or "text"

Every picture has one caption and every caption a picture; other lines, and pictures without one,
are named. Pictures are read as `fewstep.data.readers` reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.batches import epoch_order
from fewstep.data.embeddings import Conditioned, Embeddings
from fewstep.data.errors import Problems
from fewstep.data.picture_set import load_pictures
from fewstep.data.prompts import cleaned, json_lines, text_of
from fewstep.data.readers import Reader, reader_of
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch
from fewstep.storage.files import digest

FILE = "metadata.jsonl"


@dataclass(frozen=True, eq=False)
class CaptionedFolder:
    """A folder of pictures with captions, checked to match: picture i has caption i."""

    reader: Reader
    captions: Sequence[str]

    @property
    def fingerprint(self) -> str:
        """A digest that changes with a caption, or with a name or size of a picture."""
        digests = digest(self.reader.path / FILE) + self.reader.fingerprint()
        return hashlib.sha256(digests.encode()).hexdigest()

    @property
    def keys(self) -> list[str]:
        """What each picture's latent is found by: its name and size, as in the fingerprint.

        "upright": latents of earlier versions are of pictures as they lay in their files.
        """
        home = self.reader.path
        return [f"{name} {(home / name).stat().st_size} upright" for name in self.reader.names]


def open_captions(path: Path | str) -> CaptionedFolder:
    """Read captions and list pictures of a folder; ValueError names what does not match."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"there is no folder {path} of pictures; name one with --domain \"Captions('FOLDER')\""
        )
    if not (path / FILE).exists():
        raise ValueError(f"{path} holds no {FILE}, with a line for each picture")
    reader, captions = reader_of(path), dict[str, str]()
    reader.notes.forget(FILE)
    names, problems = set(reader.names), Problems(path / FILE)
    for line, row in json_lines(path / FILE):
        text = cleaned(text_of(row, path / FILE, line), path / FILE, line)
        name = row.get("file_name")
        if not isinstance(name, str) or name not in names:
            problems.add("lines without a picture", f"line {line}", str(name))
        elif name in captions:
            problems.add("pictures with two captions", name)
        elif not text:
            problems.add("pictures with an empty caption", name)
        else:
            captions[name] = text
    if not problems.counts:  # else these are among them
        for name in reader.names:
            if name not in captions:
                problems.add("pictures without a caption", name)
    problems.refuse()
    return CaptionedFolder(reader, [captions[name] for name in reader.names])


def encode_all(
    folder: CaptionedFolder, table: Embeddings, teacher: Generator, size: tuple[int, int]
) -> None:
    """Put the latents of all pictures that are not there yet into `table`.

    size: (height, width) of the pictures that the teacher's VAE is given, in pixels; others are
    cut to these proportions in their middle and resized. A ValueError names damaged ones before
    any is encoded.
    """
    keys = folder.keys
    missing = set(table.missing(keys))
    rows = torch.tensor([row for row, name in enumerate(keys) if name in missing])
    if not len(rows):
        return
    pictures = load_pictures(folder.reader, rows, (3, *size), size[0])
    place = {keys[row]: i for i, row in enumerate(rows.tolist())}

    def encode(names: Sequence[str]) -> dict[str, Tensor]:
        x = pictures.take(torch.tensor([place[name] for name in names]))
        return {"latent": teacher.encode(x.float() / 127.5 - 1)}

    for _ in table.fill([keys[row] for row in rows.tolist()], encode, 8, "pictures"):
        pass


@dataclass(frozen=True, eq=False)
class Captioned:
    """Batches of latents with the conditions of their captions, visited epoch by epoch."""

    prompts: Conditioned
    latents: Embeddings
    keys: Sequence[str]
    """Of the pictures, in the order of the prompts."""

    def __call__(self, draws: Draws) -> Batch:
        return self.prompts(draws)._replace(x0=self.at(epoch_order(draws, len(self.keys))))

    def condition(self, index: Tensor) -> dict[str, Tensor]:
        """The conditions that samples `index` (N,) have by default: the captions in turn."""
        return self.prompts.condition(index)

    def at(self, rows: Tensor) -> Tensor:
        """The latents of pictures `rows` (N,): (N, *)."""
        stored = self.latents.rows([self.keys[row] for row in rows.tolist()])
        return stored["latent"].to(rows.device)
