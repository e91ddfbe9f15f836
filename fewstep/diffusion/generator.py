"""A denoiser with what is needed to sample it: teachers and students alike.

What a pretrained model brings beside its network (how it is sampled, its labels, its codec, its
origin) is the same bundle as a finished student, so a student can be a teacher in its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.model import Model
from fewstep.diffusion.pixels import finite
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.sampler_changes import in_steps
from fewstep.diffusion.types import Cond, Sampler, device_of, select_rows


@dataclass(frozen=True)
class Generator:
    """Noise to pictures; a teacher, or a finished student."""

    denoiser: Any
    """A `Denoiser` and `nn.Module`."""
    sampler: Sampler
    """How it is sampled by default: many calls for a teacher, one to four for a student."""
    shape: tuple[int, ...]
    """Shape of one sample x_0, without the batch."""
    classes: int = 0
    """Number of labels, 0 for an unconditional model; the null label is `classes`."""
    model: Model | None = None
    """The description the network can be rebuilt from, where there is one."""
    decode: Callable[[Tensor], Tensor] = lambda x: x
    """x_0 -> picture in [-1, 1]; a VAE's decoder, or the identity."""
    encode: Callable[[Tensor], Tensor] = lambda x: x
    """Picture in [-1, 1] -> x_0."""
    text: Callable[[Sequence[str]], Cond] | None = None
    """Prompts -> their conditions, of a model that takes prompts."""
    release: Callable[[], None] = lambda: None
    """Lets go of what `text` and `decode` have loaded, until they are called again."""
    condition: Callable[[Tensor], Cond] | None = None
    """Numbers of samples (N,) -> their conditions by default; None: label i modulo `classes`."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """What is known of origin, method and licence."""

    @property
    def device(self) -> torch.device:
        """The device of the network's first parameter, or buffer where there are none."""
        return device_of(self.denoiser)

    def in_steps(self, steps: int) -> Generator:
        """The same generator, sampled in another number of steps.

        `fewstep.diffusion.sampler_changes.in_steps` says what becomes of its times, and raises
        ValueError where it has steps of its own.
        """
        return replace(self, sampler=in_steps(self.sampler, steps))

    def guided(self, kappa: float) -> Generator:
        """The same generator, sampled with guidance at scale kappa; 1 is none.

        ValueError where it takes neither labels nor prompts.
        """
        if not self.classes and self.text is None:
            raise ValueError("guidance needs prompts or labels, and this model takes none")
        return self if kappa == 1 else replace(self, sampler=CFG(self.sampler, kappa))

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int] | range,
        labels: Sequence[int] | Tensor | None = None,
        batch: int = 1000,
        seed: int = 0,
        cond: Cond = None,
    ) -> Tensor:
        """Decoded samples; sample i depends on seeds[i] and `seed`, not on the other samples.

        Args:
            seeds: N sample numbers, the keys of their random numbers.
            labels: N class numbers, or (N,) int64; by default sample i gets label i modulo the
                number of classes.
            batch: samples generated together.
            seed: a further key of the random numbers of all samples.
            cond: the conditions of the N samples, for a model of another kind (see `text`);
                `labels` are then ignored.

        Returns: (N, *), what `decode` returns: pictures in [-1, 1] for models of pictures.

        Raises `NotFinite` (a ValueError) where a sample holds NaN or infinity, ValueError where
        labels do not fit the model or their number differs from N.
        """
        index = torch.tensor(list(seeds), dtype=torch.int64)
        if cond is None:
            cond = self.conditions(index, labels)
        parts = []
        for rows in torch.arange(len(index)).split(batch):
            draws = Draws(index[rows].to(self.device), seed, "sample/")
            z = draws.normal("z", self.shape)
            here = select_rows(cond, rows, self.device)
            x = finite(self.sampler(self.denoiser, z, here, draws))
            parts.append(finite(self.decode(x)))
        return torch.cat(parts) if parts else torch.empty(0, *self.shape)

    def conditions(self, index: Tensor, labels: Sequence[int] | Tensor | None = None) -> Cond:
        """The conditions of the samples `index` (N,), by default or by `labels`.

        ValueError where the model takes no labels, or their number or range is wrong.
        """
        if not self.classes:
            if labels is not None:
                raise ValueError("this model takes no labels")
            return None if self.condition is None else self.condition(index)
        if labels is None:
            return index % self.classes
        cond = torch.as_tensor(labels, dtype=torch.int64)
        if cond.shape != index.shape:
            raise ValueError(f"got {len(cond)} labels for {len(index)} seeds")
        if len(cond) and not 0 <= int(cond.min()) <= int(cond.max()) <= self.classes:
            raise ValueError(f"labels must be 0 to {self.classes - 1}, or {self.classes} for none")
        return cond
