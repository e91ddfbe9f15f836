"""Scale-wise distillation (Starodubcev et al. 2025), https://arxiv.org/abs/2503.16397.

A student of K calls whose resolution grows from call to call (`fewstep.diffusion.scale_wise`).
One call is trained at a step, all in turn. Its input is no rollout, but real or teacher-made data
x_0 as the call before could have left them, smaller, enlarged and noised:

    x_t = alpha_t up(reduce(x_0)) + sigma_t eps,    t = t_k,

or noise alone for the first. The prediction x has the size of its call, and is compared at that
size with the teacher, which must know samples of all of them:

1. distribution matching, the direction (f_psi - f_phi) / mean |x - f_phi| at a noised x, without
   a backward pass through either network;
2. patches: the tokens of an encoder at a noised x, and at the data reduced to its size, should
   have one law (`fewstep.losses.mmd`). Both have the same time and noise, and the gradient flows
   through the encoder.

The second is of one sample and one datum that have nothing to do with each other, which is sound
where a law is that of many patches. Features of one place, as an `MLP` has them, are no law: the
"linear" kernel would pull each sample to any datum, and so to the mean, and leaves them out.

The encoder is the teacher's, as in the paper's words; the released code reads the fake score's.
The published loss has a third, adversarial term, weighed 0.005, which is left out here; so are
sizes that are not a whole factor of one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.encoder_features import require_encoder_features
from fewstep.diffusion.noise_path import perturb
from fewstep.diffusion.scale_wise import ScaleWise, reduced, reduced_noise
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import FakeScore, add_noise, kl_direction
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_data, need_draws
from fewstep.distillation.pace import Updates
from fewstep.losses.mmd import Kernel, linear_mmd, rbf_mmd, tokens
from fewstep.losses.weight import L1, Weight


@dataclass(frozen=True)
class Call:
    """Call k of a `ScaleWise` student on data, a function of the nets and a batch."""

    method: SwD
    k: int

    @property
    def scale(self) -> int:
        """How many times smaller than data its samples are."""
        return self.method.scales.scales[self.k - 1]

    def __call__(self, nets: Nets, batch: Batch) -> Tensor:
        """x: (B, *), with a gradient through nets["student"]; z is the noise of its input.

        ValueError where the batch has no data.
        """
        sampler, student = self.method.scales, _student(nets)
        x0, k = need_data(self.method, batch), self.k - 1
        t = x0.new_full((x0.shape[0],), sampler.times[k])
        if k == 0:
            noise = reduced_noise(batch.z, self.scale)
            xt = perturb(student.path, torch.zeros_like(noise), noise, t)
        else:
            before = reduced(x0, sampler.scales[k - 1])
            xt = sampler.noised(k, student.path, before, batch.z, t)
        out: Tensor = student(xt, t, batch.cond)
        return out


@dataclass(frozen=True)
class SwD(Method):
    """Scale-wise distillation: `ratio` updates of the fake score, then one of the student.

    The default is two calls, the first at half the size. It needs data, and a teacher whose
    network takes all sizes, has encoder features and was trained at all of them
    (`Pretrain(scales=(1, 2))`); a network without places, such as an `MLP`, has no patches to
    compare. ValueError for another sampler, and for values out of range. Starodubcev et al. 2025, https://arxiv.org/abs/2503.16397.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = ScaleWise()
    """A `ScaleWise`: times and sizes of the calls."""
    times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of distribution matching (published: the cleaner 16 of 28)."""
    weight: Weight = L1()
    """w of the student's direction; L1 is 1 / mean |x - f_phi|."""
    mmd: float = 1.0
    """Weight of the discrepancy of patches; 0: none, as for features of one place."""
    mmd_times: TimeLaw = Karras(0.00316, 2.5)
    """Noise levels of the patches (published: the cleaner 10 of those 16)."""
    kernel: Kernel = "linear"
    """"linear" compares the mean of patches, "rbf" their law."""
    width: float = 100.0
    """Width of the rbf kernel, in units of the encoder's features."""
    fake: FakeScore = FakeScore()
    """How the fake score learns: the noise levels and the weight of its loss."""
    ratio: Updates = 5
    """Updates of the fake score for one of the student."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers (published: 7, the teacher's
    alone); kappa_3 has no part here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sampler, ScaleWise):
            raise ValueError(f"SwD.sampler is a ScaleWise, got {self.sampler}")
        if self.mmd < 0 or self.width <= 0:
            raise ValueError(
                f"SwD needs mmd >= 0 and width > 0, got {self.mmd:g} and {self.width:g}"
            )

    @property
    def scales(self) -> ScaleWise:
        """The sampler."""
        assert isinstance(self.sampler, ScaleWise)
        return self.sampler

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of the fake score, then one of the student, at one call and its size."""
        call = Call(self, 1 + step % self.sampler.calls)
        fake = self.fake.turn(call, self.guidance)
        return *self.fake_updates(fake), Turn("student", partial(self.student_loss, call))

    def student_loss(self, call: Call, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss at one call: the KL direction, and the patches against data.

        Args:
            call: makes the student's samples x, (B, *), of the size of the call.
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser, with encoder features unless mmd is 0.
            batch: z (B, *), x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs "mmd".

        Raises ValueError where the batch has no data or draws, guidance meets no conditions, or
        the teacher has no encoder features.
        """
        x = call(nets, batch)
        score = kl_direction(nets, teacher, batch, x, self.times, self.weight, self.guidance)
        if not self.mmd:
            return Loss(score)
        apart = self.discrepancy(call, teacher, batch, x).mean()
        return Loss(score + self.mmd * apart, {"mmd": apart})

    def discrepancy(self, call: Call, teacher: Denoiser, batch: Batch, x: Tensor) -> Tensor:
        """The discrepancy of the patches of x and of the data at its size: (B,), 0 without any."""
        encoder = require_encoder_features(teacher)
        same = batch._replace(draws=need_draws(batch).under("mmd"))
        real = reduced(need_data(self, batch), call.scale)

        def patches(y: Tensor) -> Tensor:
            n = add_noise(teacher.path, y, self.mmd_times, same)
            return tokens(encoder.encode(n.xt, n.t, batch.cond))

        b = patches(real)
        if self.kernel == "rbf":
            return rbf_mmd(patches(x), b, self.width)
        return linear_mmd(patches(x), b) if b.shape[1] > 1 else x.new_zeros(len(x))


def _student(nets: Nets) -> Any:
    return nets["student"]
