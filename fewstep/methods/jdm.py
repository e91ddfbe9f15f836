"""Joint distribution matching (Luo et al. 2025), https://arxiv.org/abs/2503.06652.

A student is given a condition c that its teacher knows nothing of: a sketch, a pose, a label. What
is known is how to read c off a picture, p(c | x). The student's joint law is brought to the
teacher's, and the divergence falls into two terms that need no teacher of both:

    KL(p(x, c) || q(x) p(c | x)) = E_c KL(p(x | c) || q(x)) - E ln p(c | x) + const.

The first is distribution matching with a fake score that hears c and a teacher that does not; the
second is a reward of weight one. The optimum is the posterior q(x | c), the teacher's samples
that c could be read off.

In practice the first term is a mean over noise levels t, and levels decide how much it holds. With
q = N(mu, V), c = x + tau n, and the exact weight alpha^2 / sigma^2 of the KL divergence, the
optimum is E x = mu + g (c - mu) with, on the path alpha = 1,

    g = (V + t^2) / (V + t^2 + tau^2)    in place of the posterior's    V / (V + tau^2),

0.93 in place of 0.34 at t = 2.5, V = 1/4 and tau = 0.7: at high levels alone the condition is
obeyed too well. The weight (alpha^2 V + sigma^2) / (V sigma^2), `EDMWeight` with sigma_data^2 = V,
has the posterior's g at every level. The spread of the posterior is found at low levels alone; at
high ones samples of one condition are too much alike. On the plane that weight at low levels
(`LogNormal(-1.8, 0.7)`) finds the posteriors of a mixture. On pictures a student begins too far
from the data for it, and DMD's normaliser, the default, learns; what a strength means is then to
be found by the log "condition", of how well the condition is obeyed.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import FakeScore, Matching, Rollout, kl_direction
from fewstep.distillation.guidance_scales import Guidance, Kappas
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.distillation.pace import Updates
from fewstep.distillation.pictures import Reward, rewards_of
from fewstep.losses.weight import L1, Weight


@dataclass(frozen=True)
class JDM(Method):
    """Joint distribution matching: `ratio` updates of the fake score, then one of the student.

    It needs a teacher, which is not told the conditions (one that knows them has to have been
    trained without them too, as by `Digits(drop=0.3)`), and what reads them off pictures; no data
    but conditions. Where the student has inputs that the teacher lacks, the fake score starts
    as the student does. Losses are means over the D dimensions of a sample, so that ln p(c | x)
    has the weight strength / D. Logs of the student: "score", "condition", the mean of
    ln p(c | x). ValueError for values out of range. Luo et al. 2025,
    https://arxiv.org/abs/2503.06652.
    """

    sampler: Sampler = FewStep(t_init=2.5)
    reward: Reward = field(kw_only=True)
    """ln p(c | x) up to a constant, differentiable in x, such as `LabelReward`."""
    strength: float = 1.0
    """Weight of ln p(c | x): 1 for the joint law, more for a condition that is overdone."""
    times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of the student's score loss."""
    weight: Weight = L1()
    """w of the student's direction, which says what a strength of 1 means; L1 is DMD's."""
    fake: FakeScore = FakeScore()
    """How the fake score learns: the noise levels and the weight of its loss."""
    ratio: Updates = 1
    """Updates of the fake score for one of the student."""
    guidance: Guidance = Kappas(real=0.0)
    """Guidance scales kappa_1 .. kappa_4; at kappa_4 = 0 the teacher is told no condition, and
    kappa_3 has no part here."""
    matching: Matching = "uniform"
    """Which of a few-step student's outputs are matched: each in turn, or the "final" one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strength > 0:
            raise ValueError(f"JDM.strength is positive, got {self.strength:g}")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, and a fake score that hears what the student hears."""
        nets = super().init(teacher, net)
        shapes = [{k: v.shape for k, v in n.state_dict().items()} for n in (nets["fake"], net)]
        if shapes[0] != shapes[1]:
            nets["fake"] = deepcopy(net)
        return nets

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of the fake score, then one of the student."""
        rollout = Rollout.at(step, self.sampler, self.matching)
        fake = self.fake.turn(rollout, self.guidance)
        return *self.fake_updates(fake), Turn("student", partial(self.student_loss, rollout))

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, the KL direction and ln p(c | x) of the same samples.

        Args:
            rollout: makes the student's samples x, (B, *).
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser, which may bring a decoder (`give_decoder`).
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch; logs "score" and "condition".

        Raises ValueError where the batch has no draws, guidance meets no conditions, or samples
        are no pictures.
        """
        x = rollout(nets, batch)
        score = kl_direction(nets, teacher, batch, x, self.times, self.weight, self.guidance)
        condition = rewards_of(self.reward, teacher, x, batch.cond).mean()
        total = score - self.strength / x[0].numel() * condition
        return Loss(total, {"score": score, "condition": condition})
