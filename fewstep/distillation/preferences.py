"""Preferences between a few-step student's own trajectories, as PSO learns from them.

All calls of such a student but the last draw their state: with D the prediction at x_t,

    x_s = alpha_s D + sigma_s eps  ~  N(alpha_s D, sigma_s^2),

so a trajectory has a likelihood. Two trajectories are drawn for the same condition, the reward of
their pictures says which one wins, and with a frozen copy of the student as reference

    L = -log sigmoid(beta (log rho_w - log rho_l)),    rho = clip(p(x_s | x_t) / p_ref, low, high),

at one call of both. Miao et al. 2024, https://arxiv.org/abs/2410.03190.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.diffusion.choices import require_choices
from fewstep.diffusion.noise_path import coefficients, same_shape
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch, Denoiser, Sampler, State
from fewstep.distillation.method import Loss, Nets, need_draws
from fewstep.distillation.pictures import Reward, rewards_of


@dataclass(frozen=True)
class Preference:
    """What is preferred, and how strongly it pushes; the defaults are PSO's.

    ValueError for numbers out of range, and for other labels.
    """

    reward: Reward
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
        require_choices(self)
        if not (self.beta > 0 and 0 < self.low < 1 < self.high):
            raise ValueError(
                "Preference needs beta > 0 and low < 1 < high, got "
                f"{self.beta:g}, {self.low:g} and {self.high:g}"
            )

    def loss(self, sampler: Sampler, k: int, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The preference of one trajectory over the other, at call k.

        Args:
            sampler: how trajectories are drawn, as `require_likelihood` has it.
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
        judged = (self._judged(sampler, k, nets, teacher, one) for one in pair)
        ratios, worth = zip(*judged, strict=True)
        held = [ratio.clamp(math.log(self.low), math.log(self.high)) for ratio in ratios]
        with torch.no_grad():
            first = (worth[0] - worth[1]).sigmoid()
            if self.labels == "hard":
                first = (first - 0.5).sign() / 2 + 0.5
            clipped = torch.cat([h != r for h, r in zip(held, ratios, strict=True)])
            logs = {"reward": torch.cat(worth).mean(), "clipped": clipped.to(first).mean()}
        margin = self.beta * (held[0] - held[1])
        return Loss((first * softplus(-margin) + (1 - first) * softplus(margin)).mean(), logs)

    def _judged(
        self, sampler: Sampler, k: int, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """(log p / p_ref of call k, with its gradient; the reward of the picture): (B,) each."""
        student: Any = nets["student"]
        with torch.no_grad():
            states = list(sampler.states(student, batch.z, batch.cond, batch.draws))
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


def require_likelihood(method: object, sampler: Sampler) -> None:
    """ValueError for a sampler whose trajectories have no likelihood."""
    if not isinstance(sampler, FewStep) or sampler.noise != "fresh" or sampler.calls < 2:
        raise ValueError(
            f"{type(method).__name__}.sampler is a FewStep of 2 calls or more with fresh noise, "
            f"without which a trajectory has no likelihood; got {sampler}"
        )
