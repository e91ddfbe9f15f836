"""Prompts alone: text-to-image distillation without pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.data.embeddings import Conditioned, Embeddings, key
from fewstep.data.prompts import read_prompts
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.types import Source, select_rows
from fewstep.domains.domain import Domain
from fewstep.eval.clip import weights_of
from fewstep.eval.clip_monitor import PromptMetrics
from fewstep.storage.files import digest, require_unchanged
from fewstep.storage.folder_lock import locked
from fewstep.teachers.diffusers.load import pipeline_card
from fewstep.teachers.diffusers.negative_prompt import with_negative
from fewstep.teachers.diffusers.prompt_lengths import lost
from fewstep.teachers.preflight import preflight
from fewstep.training.progress import remark

EXAMINED = 4
"""Prompts whose samples the teacher is examined on."""


@dataclass(frozen=True, kw_only=True)
class Prompted(Domain):
    """What domains with prompts share: prompt metrics, and the check of the teacher."""

    clip: str = ""
    """A CLIP (folder, or my_file.py:Name) that tells at each look how well pictures fit their
    prompts: quick.clip in gauges.jsonl, which --best.metric can follow."""
    judged: int = 64
    """Pictures that the CLIP is asked about, of the first prompts in turn."""

    negative: str = ""
    """A prompt that guidance leads away from, in place of no prompt: of the teacher, and of the
    nets that start as it."""

    def __post_init__(self) -> None:
        if self.judged < 1:
            raise ValueError(f"{type(self).__name__}.judged must be at least 1, got {self.judged}")

    check: bool = True
    """Whether the teacher is examined first (see fewstep.teachers.preflight)."""

    def prepared(self, teacher: Generator) -> Generator:
        """Guided away from `negative`, where there is one; its network is changed."""
        if not self.negative:
            return teacher
        if cut := lost(teacher.card, [self.negative]):
            remark(f"of the negative prompt: {cut}")
        return with_negative(teacher, self.negative)

    def refuse(self, data_free: bool) -> None:
        """Raise ValueError where the domain lacks what a method needs; by default never."""

    def doubts(self, teacher: Generator) -> str:
        """Why the pre-flight check would refuse the teacher, on its own samples; or ""."""
        if not self.check or teacher.text is None:
            return ""
        prompts = self.shown(EXAMINED)
        cond = teacher.text([prompts[i % len(prompts)] for i in range(EXAMINED)])
        teacher.release()
        try:
            preflight(
                teacher, select_rows(cond, torch.arange(EXAMINED), teacher.device), None, EXAMINED
            )
        except ValueError as error:
            return str(error)
        return ""

    def settled(self) -> Domain:
        """The domain as it is; ValueError where `clip` names no CLIP."""
        self._judging()
        return self

    def _judging(self) -> Path | None:
        """The file behind the prompt metrics: weights or code; None if there are no metrics."""
        file, _, name = self.clip.rpartition(":")
        if file.endswith(".py"):
            if not Path(file).is_file():
                raise ValueError(f"there is no file {file} with {name} in it")
            return Path(file)
        return weights_of(Path(self.clip)) if self.clip else None

    def digests(self) -> dict[str, str]:
        """SHA-256 of the CLIP, whose metric can end a run."""
        file = self._judging()
        return {} if file is None else {"clip": digest(file)}

    def judge(self) -> PromptMetrics | None:
        """CLIP similarity of `judged` samples to the first prompts; None without `clip`."""
        if not self.clip:
            return None
        texts = self.shown(self.judged)
        return PromptMetrics(self.clip, [texts[i % len(texts)] for i in range(self.judged)])


@dataclass(frozen=True)
class Prompts(Prompted):
    """Prompts from a file, and no pictures."""

    example: ClassVar[str] = "Prompts('prompts.txt')"
    places: ClassVar[tuple[str, ...]] = ("file", "cache", "clip")
    file: str = "prompts.txt"
    """File of prompts: .txt, .jsonl, .csv or .parquet (see fewstep.data.prompts)."""
    cache: str = ""
    """Folder of their embeddings; by default beside the file, FILE.embeddings."""
    sha256: str = ""
    """Digest of the file, recorded by the run; another file of that name is refused."""

    def settled(self) -> Domain:
        """With the digest of the file as it is now."""
        if not Path(self.file).is_file():
            raise ValueError(
                f"there is no file {self.file} of prompts; name one with --prompts FILE"
            )
        super().settled()
        return replace(
            self, sha256=require_unchanged(self.file, self.sha256, digest(Path(self.file)))
        )

    def refuse(self, data_free: bool) -> None:
        """Raise ValueError for methods that learn from data: prompts have no pictures."""
        if not data_free:
            raise ValueError(
                "a file of prompts has no pictures; choose a method without data, or say "
                "--domain \"Captions('FOLDER')\""
            )

    def shown(self, count: int) -> list[str]:
        """The first `count` prompts of the file."""
        return read_prompts(self.file)[:count]

    def source(self, model: Model, data_free: bool) -> Source:
        """Always a ValueError: prompts need a teacher that encodes them, see `source_for`."""
        raise ValueError("prompts need a teacher that understands them; pass its pipeline folder")

    def source_for(self, teacher: Generator | None, model: Model, data_free: bool) -> Source:
        """Noise and prompts; encodes what is not in the cache, and examines the teacher."""
        self.refuse(data_free)
        if teacher is None or teacher.text is None:
            return self.source(model, data_free)
        home = Path(self.cache or f"{self.file}.embeddings")
        source = conditioned(read_prompts(self.file), home, teacher, model.shape)
        teacher.release()  # the encoders' memory
        if self.check:
            examine_on(teacher, source)
        return source


def conditioned(
    prompts: Sequence[str], cache: Path, teacher: Generator, shape: tuple[int, ...]
) -> Conditioned:
    """Noise of `shape` and these prompts; encodes those that are not in the folder `cache`."""
    assert teacher.text is not None
    remark(lost(teacher.card, prompts))
    home = cache / str(pipeline_card(teacher.card)["text"])[:16]
    with locked(home, wait=True):
        table = Embeddings(home)
        for _ in table.fill(prompts, teacher.text):
            pass
    return Conditioned(shape, table, [key(prompt) for prompt in prompts])


def examine_on(teacher: Generator, source: Conditioned, x: Tensor | None = None) -> None:
    """The pre-flight check on latents x of the first prompts, or on samples of the teacher."""
    index = torch.arange(EXAMINED)
    cond = select_rows(source.condition(index), index, teacher.device)
    preflight(teacher, cond, x, count=EXAMINED)
