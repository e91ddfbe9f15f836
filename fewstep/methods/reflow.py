"""Rectified flow and InstaFlow: reflow (Liu et al. 2022), and distillation of the straight flow.

The path from a teacher's noise z to its sample y is curved. Reflow joins the same two ends by a
straight line and learns the velocity along it (https://arxiv.org/abs/2209.03003, equation 1): in
flow time tau = sigma / (alpha + sigma), with the scaled state x_t / (alpha + sigma),

    L = E |v(tau z + (1 - tau) y, tau) - (z - y)|^2 = E |g(x_t, t) - y|^2 / tau^2,
    x_t = alpha_t y + sigma_t z,    v = (x_t / (alpha + sigma) - g) / tau,

so on every path it is the denoising of y out of its *own* noise. Where lines of two pairs cross,
their mean is learnt, so that the new flow joins noise to data otherwise, no longer than before,
and straighter: one Euler step of a straight flow is exact. A run is one reflow; a further one is a
run whose teacher is the student of the last, sampled in enough steps (`Pairs.sampler`).

Then one call is distilled (InstaFlow, Liu et al. 2023, https://arxiv.org/abs/2309.06380, section
3.2): d(G(z) - y) on the same pairs, which is the regression at tau = 1 alone, where a flow that is
nearly straight has little left to learn. d is LPIPS there, and a mean of squares here.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

from torch import nn

from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import TimeLaw, Uniform
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import generate
from fewstep.distillation.flow_maps import OfFlowTime
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_draws
from fewstep.distillation.pairs import Pairs, line_loss, pair_of
from fewstep.losses.distance import Distance, SquaredL2, regression


@dataclass(frozen=True)
class Reflow(Method):
    """One reflow on pairs of the teacher, then the distillation of its first call.

    It needs a teacher, whose samples are made first, and no data. The sampler starts where there
    is nothing but noise: the last time of the path, or near it. ValueError for steps below 0, and
    for a distillation into several calls. https://arxiv.org/abs/2309.06380.
    """

    sampler: Sampler = FewStep(t_init=80.0)
    """How the student generates; of several calls FewStep(80.0, 4, "ddim"), with distil_steps 0:
    the flow by Euler's method."""
    pairs: Pairs = Pairs()
    """The teacher's noise and samples, z and y."""
    times: TimeLaw = Uniform()
    """The law of tau, a flow time in (0, 1)."""
    reflow_steps: int = 900
    """Training steps on the straight lines, before the distillation."""
    distil_steps: int = 900
    """Training steps of the distillation, after which the run ends; 0: reflow alone, without
    an end."""
    distance: Distance = SquaredL2()
    """d of the distillation, divided by the number of a sample's dimensions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reflow_steps < 0 or self.distil_steps < 0:
            raise ValueError(
                "Reflow needs reflow_steps and distil_steps of 0 or more, got "
                f"{self.reflow_steps} and {self.distil_steps}"
            )
        if self.distil_steps and self.sampler.calls != 1:
            raise ValueError(
                f"Reflow distils one call, but its sampler makes {self.sampler.calls}; "
                "say distil_steps=0 to sample the straight flow itself"
            )

    @property
    def length(self) -> int | None:
        """Reflow and distillation together; None without the latter."""
        return self.reflow_steps + self.distil_steps if self.distil_steps else None

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student alone: a copy of `net`."""
        return Nets({"student": deepcopy(net)})

    def noise_levels(self, path: NoisePath) -> TimeLaw:
        """The times of the flow times that it learns at."""
        return OfFlowTime(self.times, path)

    def needs_pairs(self) -> Pairs:
        """The pairs."""
        return self.pairs

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, on the lines or on their ends."""
        lines = step < self.reflow_steps or not self.distil_steps
        return (Turn("student", self.line_loss if lines else self.end_loss),)

    def after_step(self, step: Step) -> None:
        """The distillation begins anew, from the straight flow."""
        if self.distil_steps and step.step + 1 == self.reflow_steps:
            step.restart("student")

    def line_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The velocity of the straight line from z to y.

        Args:
            nets: the "student".
            teacher: not used.
            batch: its pairs (`pair_of`) and draws.

        Returns: the mean over the batch; nothing further is logged.

        Raises ValueError where the batch has no pairs or draws.
        """
        pair = pair_of(self, batch)
        tau = self.times.quantile(need_draws(batch).uniform("tau"))
        return Loss(line_loss(nets["student"], pair, tau).mean())

    def end_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """d(G(z) - y) of the pairs; arguments and errors as of `line_loss`."""
        pair = pair_of(self, batch)
        made = generate(nets, self.sampler, batch._replace(z=pair.z, cond=pair.cond))
        return Loss(regression(self.distance, made, pair.x0).mean())
