"""Pairwise sample optimisation (Miao et al. 2024), https://arxiv.org/abs/2410.03190.

A student of few calls is tuned towards a reward that need not be differentiable. All its calls but
the last draw their state: with D the prediction at x_t,

    x_s = alpha_s D + sigma_s eps  ~  N(alpha_s D, sigma_s^2),

so a trajectory has a likelihood. Two trajectories are drawn for the same condition, the reward of
their pictures says which one wins, and with a frozen copy of the student at the start as reference

    L = -log sigmoid(beta (log rho_w - log rho_l)),    rho = clip(p(x_s | x_t) / p_ref, low, high),

at one call of both, drawn anew for each step; log p is a mean over dimensions. Where the ratio has
left [low, high] its gradient is zero, and that is what holds the student: a scorer that always
prefers the same one has no finite optimum without it. Labels that are drawn as Bradley and Terry
have it, the first wins with sigmoid(r_1 - r_2), have one: of a Gaussian N(m, v) and a reward c x,
m_ref + v c / beta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fewstep.diffusion.noise_path import coefficients, same_shape
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch, Denoiser, Sampler, State
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_draws
from fewstep.distillation.pictures import Reward, rewards_of


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
    """How much a difference of mean log-ratios says; of the sum over D dimensions beta / D."""
    low: float = 0.9
    """Below this ratio of likelihoods nothing is pushed."""
    high: float = 1.1
    """Above this ratio of likelihoods nothing is pushed."""
    labels: Literal["hard", "soft"] = "hard"
    """Whether the better one always wins, as published, or with sigmoid(r_1 - r_2) only."""

    def __post_init__(self) -> None:
        few = self.sampler
        if not isinstance(few, FewStep) or few.noise != "fresh" or few.calls < 2:
            raise ValueError(
                "PSO.sampler is a FewStep of 2 calls or more with fresh noise, without which a "
                f"trajectory has no likelihood; got {few}"
            )
        if not (self.beta > 0 and 0 < self.low < 1 < self.high):
            raise ValueError(
                f"PSO needs beta > 0 and low < 1 < high, got {self.beta:g}, {self.low:g} and "
                f"{self.high:g}"
            )
        if self.labels not in ("hard", "soft"):
            raise ValueError(f"PSO.labels is 'hard' or 'soft', got {self.labels!r}")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, and the reference that it starts as."""
        return Nets({"student": deepcopy(net), "reference": deepcopy(net)})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student at a call before the last, drawn for the step."""
        k = 1 + int(Draws(torch.tensor([step])).integers("rollout", self.sampler.calls - 1))
        return (Turn("student", partial(self.student_loss, k)),)

    def student_loss(self, k: int, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The preference of one trajectory over the other, at call k.

        Args:
            k: from 1 to the number of calls less one.
            nets: the "student" and the "reference".
            teacher: asked for its decoder alone.
            batch: z (B, *), cond and draws; the second trajectory is of draws of its own.

        Returns: the mean over the batch; logs "reward" and "clipped", the share of trajectories
        that are not pushed.

        Raises ValueError where the batch has no draws, or samples are no pictures.
        """
        draws = need_draws(batch)
        other = draws.under("other")
        z = other.normal("z", batch.z.shape[1:]).to(batch.z)
        pair = [batch, batch._replace(z=z, draws=other)]
        ratios, worth = zip(*(self.judged(k, nets, teacher, one) for one in pair), strict=True)
        held = [ratio.clamp(math.log(self.low), math.log(self.high)) for ratio in ratios]
        with torch.no_grad():
            first = (worth[0] - worth[1]).sigmoid()
            if self.labels == "hard":
                first = (first - 0.5).sign() / 2 + 0.5
            clipped = torch.cat([h != r for h, r in zip(held, ratios, strict=True)])
            logs = {"reward": torch.cat(worth).mean(), "clipped": clipped.to(first).mean()}
        margin = self.beta * (held[0] - held[1])
        return Loss((first * softplus(-margin) + (1 - first) * softplus(margin)).mean(), logs)

    def judged(self, k: int, nets: Nets, teacher: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
        """(log p / p_ref of call k, with its gradient; the reward of the picture): (B,) each."""
        student: Any = nets["student"]
        with torch.no_grad():
            states = list(self.sampler.states(student, batch.z, batch.cond, batch.draws))
            worth = rewards_of(self.reward, teacher, states[-1].x0, batch.cond)
            at = states[k - 1]
            before = nets["reference"](at.xt, at.t, batch.cond)
        now = student(at.xt, at.t, batch.cond)
        same_shape(state=at.xt, x0=before)
        return log_ratio(at, now, before), worth


def log_ratio(state: State, now: Tensor, before: Tensor) -> Tensor:
    """ln p(x_s) / p_ref(x_s) of a state that was drawn around alpha_s D: (B,), a mean over D.

    now and before: (B, *), the predictions D of both at x_t.
    """
    alpha, sigma = coefficients(state.path, state.xs, state.s)
    apart = (state.xs - alpha * before) ** 2 - (state.xs - alpha * now) ** 2
    return (apart / (2 * sigma**2)).flatten(1).mean(1)
