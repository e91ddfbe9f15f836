"""Around a sample: the way from one to another, and variations of it.

A walk turns the noise of sample a into that of sample b. Both are independent standard normal, so

    z(u) = cos(pi u / 2) z_a + sin(pi u / 2) z_b,    0 <= u <= 1,

is standard normal for every u: no point of the way is less likely than its ends, as the middle of
a straight line would be. The noise that a sampler adds later is turned in the same way.

A variation adds noise to a finished sample up to a share tau = sigma / (alpha + sigma), and
removes it again (SDEdit, Meng et al. 2021, https://arxiv.org/abs/2108.01073):

    x_t = alpha_t x_0 + sigma_t eps,    tau(t) = share.

At share 0 it is the sample itself, at share 1 another one.

    walk(open_model("runs/sid"), 3, 8, count=9, label=5)
    variations(open_model("runs/sid"), 3, range(100, 108), share=0.4, label=5)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.pixels import finite
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.sampler_changes import from_share, starting
from fewstep.diffusion.types import Cond, Sampler, State, select_rows


@dataclass(frozen=True, kw_only=True)
class Turned(Draws):
    """The draws of the samples `index`, turned towards those of the samples `other`.

    Attributes:
        other: (B,) int64, the numbers of the other samples.
        share: (B,) float64 in [0, 1]: 0 for the first samples, 1 for the others.

    Normal noise is turned; other numbers are those of the first samples.
    """

    other: Tensor
    share: Tensor

    def normal(
        self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(B, *shape) standard normal numbers; exactly those of an end where the share is 0 or 1.

        ValueError where both ends are one sample, whose noise is not independent of itself.
        """
        if bool((self.index == self.other).any()):
            raise ValueError("a walk leads from one seed to another; both are the same")
        first = super().normal(purpose, shape, dtype)
        second = Draws(self.other, self.seed, self.prefix).normal(purpose, shape, dtype)
        angle = self.share.double() * (math.pi / 2)
        far = torch.where(self.share == 1, 0, angle.cos())
        a, b = (w.to(dtype).reshape(-1, *(1,) * len(shape)) for w in (far, angle.sin()))
        return a * first + b * second


@dataclass(frozen=True)
class Start:
    """What a sampler starts from: all that makes these samples, but the network."""

    sampler: Sampler
    z: Tensor
    """(B, *)."""
    cond: Cond
    draws: Draws

    def states(self, generator: Generator) -> Iterator[State]:
        """The states of the sampler with the generator's network."""
        return self.sampler.states(generator.denoiser, self.z, self.cond, self.draws)

    @torch.no_grad()
    def x0(self, generator: Generator) -> Tensor:
        """The samples, not decoded: (B, *); `NotFinite` where one holds NaN or infinity."""
        return finite(deque(self.states(generator), maxlen=1).pop().x0)

    @torch.no_grad()
    def samples(self, generator: Generator) -> Tensor:
        """The samples as `Generator.sample` returns them: decoded, (B, *)."""
        return finite(generator.decode(self.x0(generator)))


@torch.no_grad()
def start(
    generator: Generator, seeds: Sequence[int], label: int | None = None, prompt: str | None = None
) -> Start:
    """Where `Generator.sample` starts for these seeds, of one label or prompt, in one batch."""
    draws = Draws(torch.tensor(list(seeds), dtype=torch.int64).to(generator.device), 0, "sample/")
    return _start(generator, draws, label, prompt)


@torch.no_grad()
def start_of_walk(
    generator: Generator,
    first: int,
    second: int,
    count: int,
    label: int | None = None,
    prompt: str | None = None,
) -> Start:
    """Where `walk` starts: `count` points of the way from seed `first` to seed `second`."""
    if count < 2 or first == second:
        raise ValueError(
            "a walk leads from one seed to another, in 2 pictures or more; got seeds "
            f"{first} and {second}, and {count}"
        )
    ends = (torch.full((count,), end).to(generator.device) for end in (first, second))
    share = torch.linspace(0, 1, count, dtype=torch.float64).to(generator.device)
    index, other = ends
    turned = Turned(index, 0, "sample/", other=other, share=share)
    return _start(generator, turned, label, prompt)


@torch.no_grad()
def start_of_variations(
    generator: Generator,
    x0: Tensor,
    seeds: Sequence[int],
    share: float,
    label: int | None = None,
    prompt: str | None = None,
) -> Start:
    """Where variations of x0 start, a sample (1, *) that is not decoded.

    seeds: whose noise is added; share: how much, in (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of noise is between 0 and 1, got {share:g}")
    if x0.shape != (1, *generator.shape):
        raise ValueError(
            f"a sample of shape {tuple(x0.shape[1:])} cannot be varied by a model of samples of "
            f"shape {generator.shape}"
        )
    plain = start(generator, seeds, label, prompt)
    path = generator.denoiser.path
    sampler = from_share(generator.sampler, path, share)
    return replace(plain, sampler=sampler, z=starting(sampler, path, x0, plain.z))


def walk(
    generator: Generator,
    first: int,
    second: int,
    count: int,
    label: int | None = None,
    prompt: str | None = None,
) -> Tensor:
    """Samples on the way from seed `first` to seed `second`, both among them.

    Args:
        generator: a student or a teacher.
        first, second: the sample numbers of the ends, which differ.
        count: of the samples, 2 or more, evenly along the way.
        label: the class of all; by default that of the first seed.
        prompt: of all, for a model that takes prompts.

    Returns: (count, *), decoded, as of `Generator.sample`. ValueError for other arguments.
    """
    return start_of_walk(generator, first, second, count, label, prompt).samples(generator)


def variations(
    generator: Generator,
    of: int,
    seeds: Sequence[int],
    share: float,
    label: int | None = None,
    prompt: str | None = None,
    source: Generator | None = None,
) -> Tensor:
    """Variations of sample number `of`: noised up to a share, and denoised.

    Args:
        generator: a student or a teacher, which denoises.
        of: the number of the sample.
        seeds: of the noise that is added, one for each variation.
        share: of noise, sigma / (alpha + sigma), between 0 and 1; beyond where the generator's
            sampler starts it is that.
        label, prompt: of the sample and its variations; the label is by default that of `of`.
        source: what makes the sample; the generator itself by default.

    Returns: (N, *), decoded. ValueError where the sampler has a course of its own.
    """
    maker = generator if source is None else source
    x0 = start(maker, [of], label, prompt).x0(maker)
    label = default_label(generator, of, label)
    return start_of_variations(generator, x0, seeds, share, label, prompt).samples(generator)


def default_label(generator: Generator, seed: int, label: int | None) -> int | None:
    """The label itself, or where there is none the one that sample `seed` has by default."""
    return seed % generator.classes if label is None and generator.classes else label


def _start(generator: Generator, draws: Draws, label: int | None, prompt: str | None) -> Start:
    index = draws.index.cpu()
    if (prompt is None) != (generator.text is None):
        raise ValueError("this model " + ("takes no prompt" if prompt else "needs a prompt"))
    if generator.text is not None:
        cond = generator.text([str(prompt)] * len(index))
    else:
        labels = None if label is None else [label] * len(index)
        cond = generator.conditions(index, labels)
    every = torch.arange(len(index))
    here = select_rows(cond, every, generator.device)
    return Start(generator.sampler, draws.normal("z", generator.shape), here, draws)
