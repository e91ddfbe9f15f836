"""`Domain`: the data of a run, its prompts or labels, and how samples of it are measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.types import Cond, Source
from fewstep.eval.clip_monitor import PromptMetrics
from fewstep.eval.domain_scores import SampleMetrics

Conditions = Callable[[Tensor], Cond]
"""Numbers of samples (N,) -> their conditions."""


class Domain(ABC):
    """What is learnt: the data to train on, and how samples are measured.

    Subclasses are frozen dataclasses, so that a run records them as JSON; only `source` has to be
    defined. `places` names fields that are mere paths.
    """

    example: ClassVar[str] = ""
    """How it is written on a command line, where it has to name a file."""
    places: ClassVar[tuple[str, ...]] = ()
    """Fields that only say where files are, which the domain's digests tell apart."""
    decodes: ClassVar[bool] = True
    """Whether samples (4, H, W) are an autoencoder's latents, to be decoded for people."""

    @abstractmethod
    def source(self, model: Model, data_free: bool) -> Source:
        """Batches of training samples for `model`.

        Arguments:
            model: the network; its `shape` and `classes` must suit the data.
            data_free: give noise and conditions alone, without x0.
        Returns a function of random draws, which gives a `Batch` of x0 and z: (B, *model.shape).
        Raises ValueError where data are missing or do not suit the model.
        """

    def source_for(self, teacher: Generator | None, model: Model, data_free: bool) -> Source:
        """As `source`, where the teacher makes the conditions (prompts); by default `source`.

        Arguments:
            teacher: the generator that encodes prompts, or None.
            model, data_free: see `source`.
        Raises ValueError where the teacher is not usable for these data.
        """
        return self.source(model, data_free)

    def prepared(self, teacher: Generator) -> Generator:
        """The teacher as this domain asks it, such as with a negative prompt; by default as it is.

        Raises ValueError where the teacher cannot be asked so.
        """
        return teacher

    def conditions(self) -> Conditions | None:
        """The conditions that samples have by default, where they come from the domain's data.

        None, by default, for labels, which every model can count, and for prompts.
        """
        return None

    def settled(self) -> Domain:
        """The domain as a run records it: with the digests of its files filled in.

        Raises ValueError where files are missing, or are not those that were recorded.
        """
        return self

    def digests(self) -> dict[str, str]:
        """SHA-256, by role, of files that influence a run and are not its data, such as a CLIP."""
        return {}

    def sample_metrics(self) -> SampleMetrics | None:
        """Reference data and features that samples are measured with, or None."""
        return None

    def judge(self) -> PromptMetrics | None:
        """Prompt metrics: how well samples fit their prompts; None where nothing measures that."""
        return None

    def shown(self, count: int) -> list[str]:
        """The first `count` prompts, for grids and reports; [] where there are none."""
        return []

    def exact(self) -> Generator | None:
        """The exact teacher, where the distribution is known in closed form; else None."""
        return None
