"""Pictures with captions as the domain of text-to-image recipes that learn from data.

    fewstep distill t2i --teacher PIPE --domain "Captions('photos')" --method ...

The folder's pictures are encoded once by the pipeline's own VAE, its captions by the text
encoders; both are kept beside the folder and found again by whichever run asks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from fewstep.data.captions import Captioned, encode_all, open_captions
from fewstep.data.embeddings import Embeddings, key
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.types import Source
from fewstep.domains.domain import Domain
from fewstep.domains.prompts import EXAMINED, Prompted, conditioned, examine_on
from fewstep.storage.files import require_unchanged
from fewstep.storage.folder_lock import locked
from fewstep.teachers.diffusers.load import pipeline_card
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.training.progress import remark


@dataclass(frozen=True)
class Captions(Prompted):
    """Pictures with captions from a folder with a metadata.jsonl."""

    example: ClassVar[str] = "Captions('FOLDER')"
    places: ClassVar[tuple[str, ...]] = ("folder", "cache", "clip")
    folder: str = ""
    """Folder of pictures with a metadata.jsonl of captions (see fewstep.data.captions)."""
    cache: str = ""
    """Where latents and embeddings are kept; by default beside the folder, FOLDER.encoded."""
    sha256: str = ""
    """Fingerprint of the folder, recorded by the run; another one in its place is refused."""

    def settled(self) -> Domain:
        """With the fingerprint of the folder as it is now."""
        if not self.folder:
            raise ValueError("this run learns from pictures: say --domain \"Captions('FOLDER')\"")
        super().settled()
        fingerprint = open_captions(self.folder).fingerprint
        return replace(self, sha256=require_unchanged(self.folder, self.sha256, fingerprint))

    def shown(self, count: int) -> list[str]:
        """The first `count` captions of the folder."""
        return list(open_captions(self.folder).captions[:count])

    def source(self, model: Model, data_free: bool) -> Source:
        """Always a ValueError: captions need a teacher that encodes them, see `source_for`."""
        raise ValueError("captions need a teacher that understands them; pass its pipeline folder")

    def source_for(self, teacher: Generator | None, model: Model, data_free: bool) -> Source:
        """Latents and captions, or captions alone; encodes what is not in the cache."""
        if teacher is None or teacher.text is None or not isinstance(model.net, DiffusersNet):
            return self.source(model, data_free)
        captioned = open_captions(self.folder)
        home = Path(self.cache or f"{self.folder.rstrip('/')}.encoded")
        height, width = (model.net.scale * side for side in model.shape[1:])
        vae = str(pipeline_card(teacher.card).get("vae", ""))[:16]
        place = home / (f"{vae}-{height}" + (f"x{width}" if width != height else ""))
        with locked(place, wait=True):
            latents = Embeddings(place)
            encode_all(captioned, latents, teacher, (height, width))
        remark(*(f"{self.folder}: {line}" for line in captioned.reader.notes.lines()))
        prompts = conditioned(captioned.captions, home, teacher, model.shape)
        teacher.release()  # the encoders' memory
        source = Captioned(prompts, latents, [key(name) for name in captioned.keys])
        if self.check:
            examined = torch.arange(EXAMINED) % len(captioned.captions)
            examine_on(teacher, prompts, source.at(examined).to(teacher.device))
        return prompts if data_free else source
