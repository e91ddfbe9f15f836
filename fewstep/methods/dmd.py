"""Distribution matching distillation (Yin et al. 2023), https://arxiv.org/abs/2311.18828.

The student is pushed along the gradient of KL(student || teacher), evened out over noise levels
(equations 7 and 8), and pulled to the teacher's own samples on a set of pairs (z, y) of noise and
the teacher's deterministic sample from it (equation 9):

    (f_psi - f_phi) / mean |x - f_phi|  on x = G(z'),    regression * d(G(z) - y).

The divergence alone knows the distribution but not which noise makes which picture: the mirrored
student G(-z) has the same law. The regression fixes that, and keeps modes. Of a student of several
calls, which the paper does not have, it is on the first: y belongs to z, and noise that is drawn
anew between calls makes what follows a matter of chance, so that the last call's best fit to y is
a mean of samples. Student first, then one update of the fake score, as published.

d is a mean over pixels or latents, or a distance in features of decoded pictures, as the paper's
LPIPS is, or in the teacher's own (`fewstep.distillation.feature_distance`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import FakeScore, Matching, Rollout, kl_direction
from fewstep.distillation.feature_distance import AnyDistance, sample_distance
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.distillation.pairs import Pairs, pair_of
from fewstep.losses.distance import SquaredL2
from fewstep.losses.weight import L1, EDMWeight, Weight


@dataclass(frozen=True)
class DMD(Method):
    """Distribution matching distillation with regression on pairs, one update of each net.

    The defaults are those of ImageNet 64: from sigma = 80, levels 20 to 980 of EDM's 1000, a
    regression of weight 0.25. Of several calls the first is regressed, which alone knows a pair's
    noise. It needs a teacher, whose samples are made first, and no data. ValueError where
    regression is negative. Yin et al. 2023, https://arxiv.org/abs/2311.18828.
    """

    sampler: Sampler = FewStep(t_init=80.0)
    times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of the student's score loss."""
    weight: Weight = L1()
    """w of the student's direction; L1 is 1 / mean |x - f_phi|."""
    fake: FakeScore = FakeScore(Karras(), EDMWeight())
    """How the fake score learns: the noise levels and the weight of its loss."""
    pairs: Pairs = Pairs()
    """The teacher's samples that are regressed on."""
    regression: float = 0.25
    """Weight of the regression, lambda; 0 leaves the pairs out."""
    distance: AnyDistance = SquaredL2()
    """d of the regression, a mean over dimensions, or a distance in features of pictures."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regression < 0:
            raise ValueError(f"DMD.regression is 0 or more, got {self.regression:g}")

    def needs_pairs(self) -> Pairs | None:
        """The pairs, unless the regression has no weight."""
        return self.pairs if self.regression else None

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, then one of the fake score on the new student's samples."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        fake = self.fake.turn(rollout, self.guidance)
        return Turn("student", partial(self.student_loss, rollout)), fake

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss: the KL direction, and the regression of the first call on pairs.

        Args:
            rollout: makes the student's samples x, (B, *).
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples, and pairs (`pair_of`).

        Returns: the mean over the batch; logs "score" and "regression".

        Raises ValueError where the batch has no draws or no pairs, or guidance meets no
        conditions.
        """
        x = rollout(nets, batch)
        score = kl_direction(nets, teacher, batch, x, self.times, self.weight, self.guidance)
        if not self.regression:
            return Loss(score)
        pair = pair_of(self, batch)
        made = Rollout(self.sampler, 1)(nets, batch._replace(z=pair.z, cond=pair.cond))
        two = made, pair.x0
        apart = sample_distance(self.distance, teacher, *two, batch, pair.cond).mean()
        return Loss(score + self.regression * apart, {"score": score, "regression": apart})
