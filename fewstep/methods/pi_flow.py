"""pi-Flow: a student that answers with a policy (Chen et al. 2025).

A call of the student returns a function pi(x, t), which says the flow's velocity at every state of
its segment of time, and is integrated in many substeps without further calls
(`fewstep.diffusion.policies`). It learns by imitation (https://arxiv.org/abs/2510.14974, algorithm
1): the policy, detached, is followed from the segment's start to a random state x_t of its own,
the teacher says which velocity it would take there, and pi is moved to it,

    L = E |v_pi(x_t, t) - v(x_t, t)|^2,    v(x, t) = (x - f(x, t)) / tau,

in flow time tau = sigma / (alpha + sigma) and for x scaled by alpha + sigma. So the states are
those that the student will meet, errors included, and neither a derivative nor a second time is
needed; a policy that agrees with the teacher on its way leads where the teacher does.

`states` of them are visited in a segment, one after another. For the first `mixing_steps` of
training a share of the way, which falls from 1 to 0, is the teacher's: from each state one step
with its velocity. v_pi is then the mean velocity of the policy along that step, and `window`
substeps further; alone, with `window` 0, it is its velocity at x_t. `dropout` leaves components of
a mixture out where the policy is followed.

Published settings: ImageNet, one call, 32 components, 2 states, dropout 0.05, neither mixing nor
window, and data as the segment's start; FLUX, four calls, 8 components, 4 states, dropout 0.1,
2000 steps of mixing, a window of 3; 128 substeps. Here it needs no data: segments start where the
student's own calls lead from noise, as in the released data-free variant
(https://github.com/Lakonik/piFlow), one segment a step in place of all in turn, weighted by its
length. Of its heads, all copies of the teacher's output layer, those of means get biases of
spread 0.05 on top, or they would stay equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.heads import Heads
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath, perturb
from fewstep.diffusion.policies import (
    FollowPolicy,
    GMFlow,
    Policy,
    PolicyKind,
    Source,
    answers,
    roll,
)
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_draws
from fewstep.losses.score import denoising

SPREAD = 0.05
"""Standard deviation of what is added to the biases of the heads of means, as released."""


class Stretch(NamedTuple):
    """How far the policy is followed, and then the teacher, in flow time: (B, 1, ..., 1) each."""

    own: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class PiFlow(Method):
    """Imitation of the teacher along the student's own policy.

    It needs a teacher whose network says its output layer (`fewstep.diffusion.heads`), and no
    data. The result is that network with the heads of `sampler.policy`. ValueError for another
    sampler, and for numbers out of range. Chen et al. 2025, https://arxiv.org/abs/2510.14974.
    """

    sampler: Sampler = FollowPolicy(2.5)
    """A `FollowPolicy`, whose policy it is: `GMFlow` or `DX`."""
    states: int = 2
    """States of a segment where the teacher is asked."""
    dropout: float = 0.05
    """Share of a mixture's components left out where the policy is followed in training."""
    window: int = 0
    """Substeps of the mean velocity; 0: the velocity at the state."""
    mixing_steps: int = 0
    """Training steps in which the teacher's share of the way falls from 1 to 0."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sampler, FollowPolicy):
            raise ValueError(f"PiFlow.sampler is a FollowPolicy, got {self.sampler}")
        if self.states < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                "PiFlow needs states of 1 or more and a dropout below 1, got "
                f"{self.states} and {self.dropout:g}"
            )
        if not 0 <= self.window < self.sampler.substeps or self.mixing_steps < 0:
            raise ValueError(
                "PiFlow.window is from 0 to below the sampler's substeps and mixing_steps 0 or "
                f"more, got {self.window} and {self.mixing_steps}"
            )

    @property
    def follow(self) -> FollowPolicy:
        """The sampler."""
        assert isinstance(self.sampler, FollowPolicy)
        return self.sampler

    def result(self, model: Model) -> Model:
        """`model` with the policy's heads."""
        return replace(model, heads=self.follow.policy.heads)

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student: a copy of `net` whose output layer is repeated."""
        student = Heads(deepcopy(net), self.follow.policy.heads)
        move_apart(student, self.follow.policy)
        return Nets({"student": student})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, on one of its segments."""
        k = Rollout.at(step, self.sampler, "uniform").k
        share = max(0.0, 1 - step / self.mixing_steps) if self.mixing_steps else 0.0
        return (Turn("student", partial(self.student_loss, k, share)),)

    def student_loss(
        self, k: int, share: float, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        """The difference of velocities at states of segment k.

        Args:
            k: the number of the call, from 1.
            share: of the way that is the teacher's.
            nets: the "student".
            teacher: the teacher's denoiser.
            batch: its z (B, *), cond and draws are used.

        Returns: the mean over the batch and the states; logs "segment_k", the same without the
        weight of the segment.

        Raises ValueError where the ladder does not fit the teacher's path, the batch has no draws,
        or guidance meets no conditions.
        """
        student: Any = nets["student"]
        kind, path = self.follow.policy, teacher.path
        xt, t, source = self.segment(k, student, batch)
        said = answers(student, kind, xt, t, batch.cond)
        pi = kind.read(said, source)
        detached = kind.read(said.detach(), source, self.dropped(batch))
        x, tau, losses = source.x, source.tau, []
        for stretch in self.stretches(share, source, batch):
            with torch.no_grad():
                at = (tau - stretch.own).clamp(min=self.least(path, tau))
                x = roll(detached, x, tau, at, self.follow.substeps)
                f = self.teacher_at(teacher, x, at, batch)
            tau = (at - stretch.teacher).clamp(min=self.least(path, tau))
            made = self.prediction(pi, x, at, tau, share, source)
            losses.append(denoising(made, f, at**-2).mean())
            x = x + (1 - tau / at) * (f - x)
        total = torch.stack(losses).mean()
        length = (source.tau - source.end).mean() / self.whole(path, xt)
        return Loss(total * length * self.sampler.calls, {f"segment_{k}": total.detach()})

    @torch.no_grad()
    def segment(self, k: int, student: Any, batch: Batch) -> tuple[Tensor, Tensor, Source]:
        """The state and time that the student's first k - 1 calls lead to, and its segment."""
        sampler, z = self.follow, batch.z
        ladder = [*sampler.ladder(student.path), 0.0]
        t, s = (z.new_full((len(z),), ladder[i]) for i in (k - 1, k))
        xt = perturb(student.path, torch.zeros_like(z), z, t)
        for state in islice(sampler.states(student, z, batch.cond), k - 1):
            xt = state.xs
        return xt, t, sampler.source(student.path, xt, t, s)

    def stretches(self, share: float, source: Source, batch: Batch) -> list[Stretch]:
        """The way of each state, random and in order, within the segment but its window."""
        draws, shape = need_draws(batch), source.tau.shape
        room = (source.tau - source.end) * (1 - self.window / self.follow.substeps)
        own = [draws.uniform(f"own{i}").to(source.x).reshape(shape) for i in range(self.states)]
        rest = [draws.uniform(f"on{i}").to(source.x).reshape(shape) for i in range(1, self.states)]
        ends = torch.stack([torch.zeros_like(own[0]), *own]).sort(0).values
        others = torch.stack([torch.zeros_like(own[0]), *rest, torch.ones_like(own[0])])
        steps = zip(ends.diff(dim=0), others.sort(0).values.diff(dim=0), strict=True)
        return [Stretch((1 - share) * room * a, share * room * b) for a, b in steps]

    def teacher_at(self, teacher: Denoiser, x: Tensor, tau: Tensor, batch: Batch) -> Tensor:
        """The guided teacher's prediction at scaled states: (B, *)."""
        path = teacher.path
        t = path.time_of(tau.flatten())
        size = (path.alpha(t) + path.sigma(t)).reshape(tau.shape)
        return guided(teacher, size * x, t, batch.cond, [self.kappa]).predictions[0]

    def prediction(
        self, pi: Policy, x: Tensor, tau: Tensor, then: Tensor, share: float, source: Source
    ) -> Tensor:
        """The x_0 (B, *) that the policy's velocity from tau stands for.

        then: (B, 1, ..., 1), where the teacher's step ends; the window follows it.
        """
        if not self.window and not share:
            return pi(x, tau)
        substeps = self.follow.substeps
        end = then - (source.tau - source.end) * self.window / substeps
        end = torch.minimum(end, tau - 1e-3 * tau).clamp(min=0)
        there = roll(pi, x, tau, end, max(1, self.window + round(share * substeps)))
        return x + tau * (there - x) / (tau - end)

    def dropped(self, batch: Batch) -> Tensor | None:
        """Which components are left out, (B, components), never all of a sample."""
        if not isinstance(self.follow.policy, GMFlow) or not self.dropout:
            return None
        draws = need_draws(batch)
        numbers = [draws.uniform(f"drop{i}") for i in range(self.follow.policy.components)]
        gone = torch.stack(numbers, 1) < self.dropout
        return gone & ~gone.all(1, keepdim=True)

    def least(self, path: NoisePath, like: Tensor) -> Tensor:
        """The least flow time at which networks on the path are called: ()."""
        return path.flow_time(like.new_full((), path.t_min))

    def whole(self, path: NoisePath, like: Tensor) -> Tensor:
        """The flow time of the first call: ()."""
        return path.flow_time(like.new_full((), self.follow.ladder(path)[0]))


@torch.no_grad()
def move_apart(student: Heads, kind: PolicyKind) -> None:
    """Add noise to the biases of the heads that are means of a mixture, in place."""
    if not isinstance(kind, GMFlow):
        return
    generator = torch.Generator().manual_seed(0)
    for layer in list(student.layers)[: kind.components]:
        bias = getattr(layer, "bias", None)
        if isinstance(bias, Tensor) and not bias.is_meta:
            bias += SPREAD * torch.randn(bias.shape, generator=generator).to(bias)
