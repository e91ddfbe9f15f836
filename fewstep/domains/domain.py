"""`Domain`: the data of a run, its prompts or labels, and how samples of it are measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.types import Source
from fewstep.eval.clip_monitor import PromptMetrics
from fewstep.eval.domain_scores import SampleMetrics


class Domain(ABC):
    """What the pictures are: data to train on, and how samples are measured."""

    example: ClassVar[str] = ""
    """How it is written on a command line, where it has to name a file."""
    places: ClassVar[tuple[str, ...]] = ()
    """Fields that only say where files are, which the domain's digests tell apart."""

    @abstractmethod
    def source(self, model: Model, data_free: bool) -> Source:
        """Batches for `model`; noise and labels alone if `data_free`."""

    def source_for(self, teacher: Generator | None, model: Model, data_free: bool) -> Source:
        """The same for a domain whose conditions a teacher makes; by default `source`."""
        return self.source(model, data_free)

    def settled(self) -> Domain:
        """The domain as a run records it; what names files may add their digests."""
        return self

    def digests(self) -> dict[str, str]:
        """SHA-256 of files that decide a run and are not its data, by what they are."""
        return {}

    def sample_metrics(self) -> SampleMetrics | None:
        """How samples of this domain are measured; None where nothing measures them."""
        return None

    def judge(self) -> PromptMetrics | None:
        """What tells how well samples fit their prompts; None where nothing does."""
        return None

    def shown(self, count: int) -> list[str]:
        """The first `count` prompts, for a report; none where samples have no prompts."""
        return []

    def exact(self) -> Generator | None:
        """The exact teacher of a domain that is known in closed form."""
        return None
