"""SlimFlow (Zhu et al. 2024), https://arxiv.org/abs/2407.12718: a smaller, one-step student.

A large flow is straightened from its own weights; a student of another size has none to start
from. Annealing reflow joins the two problems. With pairs (z, y) of the teacher, fresh noise e and
b falling from 1 to 0 while it trains, the student learns the straight lines

    z' = (1 - b^2)^(1/2) z + b e,    L = E |v(tau z' + (1 - tau) y, tau) - (z' - y)|^2,

in flow time tau = sigma / (alpha + sigma). At b = 1 noise and samples know nothing of one another
and L is flow matching, which small networks learn from nothing; at b = 0 it is reflow; each
is a warm start of the next. (`Reflow` is the case b = 0, and says how lines look on other paths.)

Then one call is distilled, from the pairs and from the straightened flow itself, whose
frozen average is phi: flow-guided distillation,

    L = E d(G(z) - y) + guide E d(G(z') - g_phi(x_t, t)),    x_t = ddim(x_T, G(z'), T, t).

The student's own first call, without a gradient, goes to x_t at a flow time between 0.2 and 0.8,
and one call of phi from there to the data; both ends are predictions of y, as g is, where the
paper compares mean velocities (z' - y) of two Euler steps. Its z' is new noise, so that a student
sees more than the pairs. An exact flow that is straight makes both terms zero.

The size of the student is that of the run's network: `--model.net` names a smaller one, which
starts from new weights, and of the teacher only the samples are used. From the released code
(https://github.com/yuanzhi-zhu/SlimFlow) are the schedules of b and the range of t; b ends at 60 %
of its reflow. Its d of the pairs is LPIPS, here a mean of squares; its flips are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import NoisePath, perturb
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import TimeLaw, Uniform
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import generate
from fewstep.distillation.flow_maps import OfFlowTime
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_draws
from fewstep.distillation.pairs import Pairs, line_loss, pair_of
from fewstep.losses.distance import Distance, SquaredL2, regression


@dataclass(frozen=True)
class SlimFlow(Method):
    """Annealing reflow on pairs of the teacher, then flow-guided distillation of one call.

    It needs a teacher, whose samples are made first, and no data; the student may be any network.
    The sampler is a `FewStep` of one call that starts where there is nothing but noise. ValueError
    for another, and for numbers out of range. Zhu et al. 2024, https://arxiv.org/abs/2407.12718.
    """

    sampler: Sampler = FewStep(t_init=80.0)
    """How the student generates: one call, from the last time of the path or near it."""
    pairs: Pairs = Pairs()
    """The teacher's noise and samples, z and y."""
    times: TimeLaw = Uniform()
    """The law of tau, a flow time in (0, 1)."""
    reflow_steps: int = 900
    """Training steps on the straight lines, before the distillation."""
    anneal_steps: int = 540
    """Training steps in which b falls from 1 to 0 ("exp": to 1 / e)."""
    schedule: Literal["linear", "cos", "exp"] = "linear"
    """How b falls from 1: on a line, as half a cosine, or exponentially."""
    distil_steps: int = 900
    """Training steps of the distillation, after which the run ends."""
    guide: float = 1.0
    """Weight of the flow's guidance of the distillation; 0: the pairs alone."""
    span: tuple[float, float] = (0.2, 0.8)
    """Flow times between which t of the guidance is drawn evenly."""
    distance: Distance = SquaredL2()
    """d of the distillation, divided by the number of a sample's dimensions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sampler, FewStep) or self.sampler.calls != 1:
            raise ValueError(f"SlimFlow.sampler is a FewStep of one call, got {self.sampler}")
        if min(self.reflow_steps, self.anneal_steps, self.distil_steps) < 1 or self.guide < 0:
            raise ValueError(
                "SlimFlow needs reflow_steps, anneal_steps and distil_steps of 1 or more and a "
                f"guide of 0 or more, got {self.reflow_steps}, {self.anneal_steps}, "
                f"{self.distil_steps} and {self.guide:g}"
            )
        if not 0 < self.span[0] < self.span[1] < 1:
            raise ValueError(
                f"SlimFlow.span is two flow times, 0 < low < high < 1, got {self.span}"
            )

    @property
    def length(self) -> int:
        """Reflow and distillation together."""
        return self.reflow_steps + self.distil_steps

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, and the "flow" phi that it becomes before it is distilled."""
        return Nets({"student": deepcopy(net), "flow": deepcopy(net)})

    def noise_levels(self, path: NoisePath) -> TimeLaw:
        """The times of the flow times that it learns at."""
        return OfFlowTime(self.times, path)

    def needs_pairs(self) -> Pairs:
        """The pairs."""
        return self.pairs

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, on the lines or on their ends."""
        if step < self.reflow_steps:
            return (Turn("student", partial(self.reflow_loss, self.share(step))),)
        return (Turn("student", self.end_loss),)

    def share(self, step: int) -> float:
        """b at a step of the reflow."""
        passed = step / self.anneal_steps
        if self.schedule == "exp":
            return math.exp(-passed)
        left = max(0.0, 1 - passed)
        return left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2

    def after_step(self, step: Step) -> None:
        """Before the distillation the flow becomes the student's average; it begins anew."""
        if step.step + 1 == self.reflow_steps:
            step.nets["flow"].load_state_dict(step.average.state_dict())
            step.restart("student")

    def reflow_loss(self, share: float, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The velocity of the straight lines from annealed noise to the teacher's samples.

        Args:
            share: b.
            nets: the "student".
            teacher: not used.
            batch: its pairs (`pair_of`) and draws.

        Returns: the mean over the batch; nothing further is logged.

        Raises ValueError where the batch has no pairs or draws.
        """
        pair, draws = pair_of(self, batch), need_draws(batch)
        fresh = draws.normal("anneal", pair.z.shape[1:]).to(pair.z)
        pair = pair._replace(z=math.sqrt(1 - share**2) * pair.z + share * fresh)
        tau = self.times.quantile(draws.uniform("tau"))
        return Loss(line_loss(nets["student"], pair, tau).mean())

    def end_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """d from the pairs' samples, and from the end of a path of two calls.

        Args:
            nets: the "student" and the "flow".
            teacher: not used.
            batch: its z (B, *), cond, pairs (`pair_of`) and draws.

        Returns: the mean over the batch; logs "pairs" and "guide", the two terms.

        Raises ValueError where the batch has no pairs or draws.
        """
        pair = pair_of(self, batch)
        made = generate(nets, self.sampler, batch._replace(z=pair.z, cond=pair.cond))
        ends = regression(self.distance, made, pair.x0).mean()
        if not self.guide:
            return Loss(ends, {"pairs": ends})
        own = generate(nets, self.sampler, batch)
        guide = regression(self.distance, own, self.two_calls(nets, own, batch)).mean()
        return Loss(ends + self.guide * guide, {"pairs": ends, "guide": guide})

    @torch.no_grad()
    def two_calls(self, nets: Nets, own: Tensor, batch: Batch) -> Tensor:
        """Where the flow leads from a point between z and the student's own sample: (B, *)."""
        assert isinstance(self.sampler, FewStep)
        flow: Any = nets["flow"]
        low, high = self.span
        tau = low + (high - low) * need_draws(batch).uniform("between").to(own)
        T = own.new_full((len(own),), self.sampler.ladder(flow.path)[0])
        t = flow.path.time_of(tau).minimum(T)
        xT = perturb(flow.path, torch.zeros_like(own), batch.z, T)
        end: Tensor = flow(flow.path.ddim(xT, own, T, t), t, batch.cond)
        return end
