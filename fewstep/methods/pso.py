"""Pairwise sample optimisation (Miao et al. 2024), https://arxiv.org/abs/2410.03190.

A student of few calls is tuned towards a reward that need not be differentiable. All its calls but
the last draw their state: with D the prediction at x_t,

    x_s = alpha_s D + sigma_s eps  ~  N(alpha_s D, sigma_s^2),

so a trajectory has a likelihood. Two trajectories are drawn for the same condition, the reward of
their pictures says which one wins, and with a frozen copy of the student at the start as reference

    L = -log sigmoid(beta (log rho_w - log rho_l)),    rho = clip(p(x_s | x_t) / p_ref, low, high),

at one call of both, drawn anew for each step; log p is a mean over dimensions. All of this is
`fewstep.distillation.preferences`. Where the ratio has
left [low, high] its gradient is zero, and that is what holds the student: a scorer that always
prefers the same one has no finite optimum without it. Labels that are drawn as Bradley and Terry
have it, the first wins with sigmoid(r_1 - r_2), have one: of a Gaussian N(m, v) and a reward c x,
m_ref + v c / beta.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import nn

from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Denoiser, Sampler
from fewstep.distillation.method import Method, Nets, Turn
from fewstep.distillation.pictures import Reward
from fewstep.distillation.preferences import Preference, require_likelihood


@dataclass(frozen=True)
class PSO(Method):
    """Pairs of a few-step student's own trajectories, of which a reward prefers one.

    It starts from a distilled student (`--init`), whose sampler it has to be given: a `FewStep` of
    two calls or more with fresh noise. It needs no data, and no score of the teacher. The
    published defaults: beta 50 on means over dimensions, ratios of 0.9 to 1.1. ValueError for
    another sampler, and for numbers out of range. Miao et al. 2024,
    https://arxiv.org/abs/2410.03190.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"reference"})

    sampler: Sampler = FewStep(2.5, 4)
    reward: Reward = field(kw_only=True)
    """Which of two pictures is preferred; its gradient is not used."""
    beta: float = 50.0
    """Factor of a difference of mean log-ratios, above 0 (beta / D for sums over D dimensions)."""
    low: float = 0.9
    """Ratio of likelihoods, below 1, under which nothing is pushed."""
    high: float = 1.1
    """Ratio of likelihoods, above 1, over which nothing is pushed."""
    labels: Literal["hard", "soft"] = "hard"
    """Whether the better one always wins, as published, or with sigmoid(r_1 - r_2) only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_likelihood(self, self.sampler)
        _ = self.preference  # refuses what does not fit

    @property
    def preference(self) -> Preference:
        """What is preferred, and how strongly it pushes."""
        return Preference(self.reward, self.beta, self.low, self.high, self.labels)

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, and the reference that it starts as."""
        return Nets({"student": deepcopy(net), "reference": deepcopy(net)})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student at a call before the last, drawn for the step."""
        k = 1 + int(Draws(torch.tensor([step])).integers("rollout", self.sampler.calls - 1))
        return (Turn("student", partial(self.preference.loss, self.sampler, k)),)
