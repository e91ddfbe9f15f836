"""Networks of pictures are settled wherever in a method they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.pictures import PictureFeatures
from fewstep.methods.dmd import DMD
from fewstep.runs.teacher import settled


@dataclass(frozen=True)
class Named(PictureFeatures):
    sha256: str = ""

    def settled(self) -> PictureFeatures:
        return replace(self, sha256="found")

    def __call__(self, pictures: Tensor) -> Sequence[Tensor]:
        return [pictures]


@dataclass(frozen=True)
class Holder:
    judge: Discriminator
    number: int = 1


def test_parts_of_parts_too() -> None:
    assert settled(Holder(Discriminator(None, Named()))) == Holder(
        Discriminator(None, Named("found"))
    )
    assert settled(DMD(distance=Named())) == DMD(distance=Named("found"))


def test_what_reads_no_file_stays_what_it_is() -> None:
    for part in (Holder(Discriminator()), DMD()):
        assert settled(part) is part
