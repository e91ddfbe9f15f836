"""Regression on pairs: knowledge distillation (Luhman & Luhman 2021) and GET (Geng et al. 2023).

A deterministic teacher sends noise z to a sample y. Many such pairs are made once, and the student
is regressed on them (https://arxiv.org/abs/2101.02388; https://arxiv.org/abs/2401.08639, whose
network is an equilibrium transformer, which any network may take the place of here):

    L = E d(G(z) - y).

There is no noise level, no fake score and, while training, no teacher. What one call makes of z is
learnt as it is: at the minimum the student is the flow of the teacher from its noise to its data,
and every sample keeps its noise. With few pairs it learns them by heart; GET has a million.

d is the mean absolute difference, GET's choice beside LPIPS. Of a student of several calls each
one's prediction is regressed in turn, or the last one's, in both cases from the states that the
student's own calls lead to: y follows from these only if later noise is "ddim" or "fixed".
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

from torch import nn

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import Matching, Rollout
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.distillation.pairs import Pairs, pair_of
from fewstep.losses.distance import Distance, SumOfAbsolutes, regression


@dataclass(frozen=True)
class PairRegression(Method):
    """Regression on the teacher's samples from the same noise.

    It needs a teacher, whose samples are made first, and no data. ValueError for a few-step
    sampler that draws fresh noise, of which the teacher's samples know nothing. Geng et al. 2023,
    https://arxiv.org/abs/2401.08639.
    """

    sampler: Sampler = FewStep(t_init=2.5)
    pairs: Pairs = Pairs()
    """The teacher's samples that are regressed on."""
    distance: Distance = SumOfAbsolutes()
    """d, divided by the number of a sample's dimensions."""
    matching: Matching = "uniform"
    """Which of a few-step student's predictions are regressed: each in turn, or the "final"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fresh = isinstance(self.sampler, FewStep) and self.sampler.noise == "fresh"
        if fresh and self.sampler.calls > 1:
            raise ValueError(
                f"PairRegression.sampler has noise 'ddim' or 'fixed' between its calls, since "
                f"the teacher's samples do not follow from fresh noise; got {self.sampler}"
            )

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student alone: a copy of `net`."""
        return Nets({"student": deepcopy(net)})

    def needs_pairs(self) -> Pairs:
        """The pairs."""
        return self.pairs

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        return (Turn("student", partial(self.student_loss, rollout)),)

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """d(G(z) - y) of the pairs.

        Args:
            rollout: makes the student's samples of the pairs' noise.
            nets: the "student".
            teacher: not used.
            batch: its pairs (`pair_of`), and draws where the sampler needs them.

        Returns: the mean over the batch; nothing further is logged.

        Raises ValueError where the batch has no pairs.
        """
        pair = pair_of(self, batch)
        made = rollout(nets, batch._replace(z=pair.z, cond=pair.cond))
        return Loss(regression(self.distance, made, pair.x0).mean())
