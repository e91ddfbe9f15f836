"""Distillation with a reward, as in Hyper-SD (Ren et al. 2024), https://arxiv.org/abs/2404.13686.

A reward r says what a picture is worth to someone: how well it fits its prompt, how it looks. One
that can be differentiated is fed back straight into the generator (ReFL, Xu et al. 2023,
https://arxiv.org/abs/2304.05977): the sample of the last call, x, is decoded, and

    L = L_method - weight * E min(r(decode(x), c), ceiling),

L_method being the loss of a student by any other method. Nothing else holds the student: a reward
alone has no optimum but its own, and a scorer is never what was meant by it. With
L_method = sum_t w_t KL(p_t || q_t) and alpha = 1, and with lambda the weight of the reward,

    at levels near the data     the optimum is the teacher's law tilted, q e^(lambda r) / Z;
    r = c x, data N(mu, V)      its mean is mu + lambda c / sum_t w_t / (V + t^2), its spread V.

So high levels hold less: at t = 2.5 the shift is 26 times that of the tilt with V = 1/4. What a
weight means depends on the method; it is chosen by a curve of the reward, of a second one that is
not learned (`held_out`) and of the distance to the data, over weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.time_distributions import TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.method import Loss, Method, Nets, Product, Step, Turn
from fewstep.distillation.pairs import Pairs
from fewstep.distillation.pictures import Reward, rewards_of


@dataclass(frozen=True)
class Rewarded(Method):
    """Another method, whose student is rewarded too: Rewarded(SiD(), Ink(), weight=0.05).

    It is a method around a method, not a field of each, because a student's loss is all that a
    reward is added to: every method can have one, those of a user's own too, and none has to know
    of it. The price is one more call of the student, whose sample the inner loss does not show. It
    is the sample of what the run would ship now (`Method.product`), made of the same noise. All
    else is the inner method's: its networks, its turns, when it is finished and what it ships.

    A loss is a mean over the D dimensions of a sample: with the weights alpha^2 / sigma^2 of the
    exact KL divergence, a tilt of lambda has the weight lambda / D.

    Logs of the student: "reward", its mean, "reward_std", and "held_out". ValueError where the
    method does not distil, and for a weight or a start out of range.
    """

    sampler: Sampler = field(init=False, repr=False)
    """That of `method`."""
    method: Method
    """What distils, and holds the student near its teacher."""
    reward: Reward
    """What is raised, such as `LabelReward`."""
    weight: float = 0.05
    """Weight of the reward in the student's loss. The default is DMDR's (Jiang et al. 2025,
    https://arxiv.org/abs/2511.13649), of a classifier's log-probability beside DMD's loss."""
    start: int = 0
    """The first step with a reward; DMDR distils for 20,000 steps before."""
    ceiling: float | None = None
    """A reward from which on nothing is pushed, alpha_d in Hyper-SD; None: none."""
    held_out: Reward | None = None
    """A second scorer, which is logged and not learned: where it falls while the first rises, the
    first is being exploited."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method.output != Rewarded.output:
            raise ValueError(
                f"Rewarded.method distils a teacher, and {type(self.method).__name__} trains one"
            )
        if not self.weight > 0 or self.start < 0:
            raise ValueError(
                f"Rewarded needs weight > 0 and start >= 0, got {self.weight:g} and {self.start}"
            )
        object.__setattr__(self, "sampler", self.method.sampler)

    @property
    def needs_data(self) -> bool:
        """Whether the method does."""
        return self.method.needs_data

    @property
    def frozen(self) -> frozenset[str]:
        """The nets that the method leaves as they are."""
        return self.method.frozen

    @property
    def couples_samples(self) -> bool:
        """Whether the method does; a reward is of each picture by itself."""
        return self.method.couples_samples

    @property
    def length(self) -> int | None:
        """When the method is finished."""
        return self.method.length

    def noise_levels(self, path: NoisePath) -> TimeLaw | None:
        """Those of the method."""
        return self.method.noise_levels(path)

    def needs_pairs(self) -> Pairs | None:
        """The pairs that the method asks for."""
        return self.method.needs_pairs()

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The networks of the method."""
        return self.method.init(teacher, net)

    def turns(self, step: int) -> Sequence[Turn]:
        """Those of the method, the student's with the reward from step `start` on."""
        return [
            turn._replace(loss=partial(self.rewarded, turn))
            if turn.net == self.output and step >= self.start
            else turn
            for turn in self.method.turns(step)
        ]

    def after_step(self, step: Step) -> None:
        """What the method does."""
        self.method.after_step(step)

    def result(self, model: Model) -> Model:
        """What the method makes of it."""
        return self.method.result(model)

    def product(self, nets: Nets, average: nn.Module, teacher: Denoiser | None) -> Product:
        """What the method ships."""
        return self.method.product(nets, average, teacher)

    def rewarded(self, turn: Turn, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The loss of the method's turn, less the reward of a sample.

        Args:
            turn: the method's own turn of the student.
            nets: the method's networks.
            teacher: the teacher's denoiser, which may bring a decoder (`give_decoder`).
            batch: what the method needs; z (B, *), cond and draws are used.

        Returns: the mean over the batch, and the method's logs and sums with the reward's.

        Raises ValueError where nothing is trained, or samples are no pictures.
        """
        loss = turn.loss(nets, teacher, batch)
        if loss.total is None:
            raise ValueError(
                f"{type(self.method).__name__} trains no student, which a reward could push"
            )
        net: Any
        net, sampler = self.product(nets, nets[self.output], teacher)
        x = sampler.part(sampler.calls, net, batch.z, batch.cond, batch.draws)
        worth = rewards_of(self.reward, teacher, x, batch.cond)
        logs = {"reward": worth.mean(), "reward_std": worth.std(correction=0)}
        if self.held_out is not None:
            with torch.no_grad():
                logs["held_out"] = rewards_of(self.held_out, teacher, x, batch.cond).mean()
        pushed = worth if self.ceiling is None else worth.clamp(max=self.ceiling)
        total = loss.total - self.weight * pushed.mean()
        return Loss(total, {**loss.logs, **logs}, loss.sums)
