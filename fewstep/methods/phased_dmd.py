"""Phased DMD (Fan et al. 2025), https://arxiv.org/abs/2510.27684.

A student of K calls learns in phases, from noise to data, and each phase has a network of its own,
an expert for its calls (`fewstep.nets.experts`). Phase k ends at a level s, that of the next
phase's first call, and 0 for the last. Its samples are states

    x_s = alpha_s x + sigma_s eps(x_t, x),    x the expert's prediction at one of its calls,

whose law is brought to that of data at s: no phase but the last has to know what data look like.
They are noised on to levels t > s and pushed by distribution matching there,

    x_t = (alpha_t / alpha_s) x_s + tau eps,    w (f_psi - f_phi)(x_t) on x_s,

which is the gradient of KL(student || teacher) at t, up to the weight. Levels go up to the
noisiest ("reverse nested" intervals, better than levels of the phase alone).

The fake score f_psi never sees an x_0. It learns by score matching in a subinterval, whose target
(x_t - sigma_t^2 eps / tau) / alpha_t needs none (`fewstep.distillation.boundary`), and whose
optimum is the score of x_t. The loss is of its product with share = tau / sigma_t,

    w min(1 / share^2, clip) |share f_psi - share target|^2,

that is w |f_psi - target|^2 but where t comes near s, where the target's noise has no bound (the
paper clips 1 / tau^2 at 10 in a flow's velocity; both are one at sigma_t = 1).

When a phase ends its expert is finished: it becomes its moving average, and nothing changes it any
more. The next expert starts as the first one did, and the fake score at the teacher again.
Within a phase of several calls a call is drawn for each step, whose prediction leads to the end of
the phase at once (with `matching` "final" it is always the last, and the others pass no gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoisers import EDM, Eps, V, Velocity
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.boundary import Renoised, renoise
from fewstep.distillation.call_inputs import require_trajectory
from fewstep.distillation.fake_score import Matching, Rollout, paced, predict_at
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_draws
from fewstep.distillation.pace import Updates
from fewstep.losses.score import denoising, kl
from fewstep.losses.weight import L1, EDMWeight, Weight
from fewstep.nets.experts import Experts, ExpertsNet
from fewstep.nets.lora import Adapted


class Reached(NamedTuple):
    """The end of a phase: states x_s (B, *), their time s (B,), None for data, and the call's
    prediction x_0 (B, *)."""

    xs: Tensor
    s: Tensor | None
    x0: Tensor


@dataclass(frozen=True)
class PhasedDMD(Method):
    """Phased DMD: `ratio` updates of the fake score and one of the phase's expert.

    All phases but the last take phase_steps training steps each. It needs a teacher and no data.
    ValueError for a sampler that is not deterministic or has not as many calls in every phase, for
    numbers out of range, and for a network with adapters. Published: 4 calls in 2 phases, ratio 5,
    fake_rate 1/125 beside adapters on the student. Fan et al. 2025,
    https://arxiv.org/abs/2510.27684.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"start"})

    sampler: Sampler = FewStep(t_init=2.5, steps=4, noise="ddim")
    """A `FewStep` with noise "ddim"; its calls are divided among the phases."""
    phases: int = 2
    """Number of phases, each with an expert of its own; it divides the sampler's calls."""
    phase_steps: int = 400
    """Training steps of each phase but the last, which goes on until the run ends."""
    times: TimeLaw = Karras(0.00316, 71.6)
    """Noise levels of both losses, cut to those above the end of the phase."""
    weight: Weight = L1()
    """w of the student's direction; L1 is 1 / mean |x - f_phi|."""
    fake_weight: Weight = EDMWeight()
    """w, the weight of the fake score's loss by noise level."""
    clip: float = 10.0
    """The largest 1 / share^2 in the fake score's loss."""
    fake_rate: float = 1.0
    """Learning rate of the fake score over the student's."""
    ratio: Updates = 1
    """Updates of the fake score for one of the student (published: 5)."""
    guidance: Guidance = Unguided()
    """Guidance scales kappa_1 .. kappa_4, for conditional teachers; kappa_3 has no part here."""
    matching: Matching = "uniform"
    """Which calls of a phase learn: each in turn, or its "final" one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sampler = require_trajectory(self, self.sampler)
        if min(self.phases, self.phase_steps) < 1 or sampler.steps % self.phases:
            raise ValueError(
                "PhasedDMD needs phases and phase_steps of 1 or more and as many calls in "
                f"every phase, got {self.phases}, {self.phase_steps} and "
                f"{sampler.steps} calls"
            )
        if self.clip <= 0 or self.fake_rate <= 0:
            raise ValueError(
                f"PhasedDMD needs clip > 0 and fake_rate > 0, got {self.clip:g} and "
                f"{self.fake_rate:g}"
            )

    @property
    def each(self) -> int:
        """Calls of a phase."""
        return self.sampler.calls // self.phases

    def ends(self, path: NoisePath) -> list[float]:
        """The level where each phase ends, 0 for the last."""
        assert isinstance(self.sampler, FewStep)
        return [*self.sampler.ladder(path)[self.each :: self.each], 0.0]

    def bounds(self, path: NoisePath, whole: bool) -> tuple[float, ...]:
        """Labels half way between the last call of a phase and the first of the next.

        whole: for networks that are whole denoisers, whose label is t.
        """
        assert isinstance(self.sampler, FewStep)
        times = torch.tensor(self.sampler.ladder(path), dtype=torch.float64, device="cpu")
        labels = (times if whole else path.label(times)).tolist()
        return tuple(
            (before + after) / 2
            for call, (before, after) in enumerate(pairwise(labels), 1)
            if call % self.each == 0
        )

    def result(self, model: Model) -> Model:
        """As many networks like the model's as there are phases."""
        bounds = self.bounds(model.path, model.predicts == "denoiser")
        return replace(model, net=Experts(model.net, bounds))

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The experts, as one "student", all as `net`; the fake score and its "start"."""
        if any(isinstance(module, Adapted) for module in net.modules()):
            raise ValueError("PhasedDMD trains whole networks, one a phase: leave out --lora")
        nets = super().init(teacher, net)
        student: Any = nets["student"]
        whole = not isinstance(student, EDM | Eps | V | Velocity)
        one = student if whole else student.net
        experts = ExpertsNet(
            (deepcopy(one) for _ in range(self.phases)), self.bounds(student.path, whole)
        )
        if whole:
            nets["student"] = experts
        else:
            student.net = experts
        nets["start"] = deepcopy(nets["fake"])
        return nets

    def phase(self, step: int) -> int:
        """The number of the phase that a training step belongs to, from 0."""
        return min(step // self.phase_steps, self.phases - 1)

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of the fake score, then one of the phase's expert."""
        phase = self.phase(step)
        call = self.each
        if self.matching == "uniform" and self.each > 1:
            call = 1 + int(Draws(torch.tensor([step])).integers("rollout", self.each))
        rollout = Rollout(self.sampler, phase * self.each + call)
        fake = Turn("fake", partial(self.fake_loss, rollout), self.fake_rate)
        return *self.fake_updates(fake), Turn("student", partial(self.student_loss, rollout))

    def after_step(self, step: Step) -> None:
        """At the end of a phase its expert becomes its average, and all starts anew."""
        super().after_step(step)
        done = self.phase(step.step)
        if self.phase(step.step + 1) == done:
            return
        finished = _experts(step.average)[done].state_dict()
        _experts(step.nets["student"])[done].load_state_dict(finished)
        step.nets["fake"].load_state_dict(step.nets["start"].state_dict())
        step.restart("fake")
        step.restart("student")

    def fake_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The fake score's loss at noised ends of the phase, which carry no gradient."""
        with torch.no_grad():
            reached = self.reached(rollout, nets, batch)
            n, share, target = self.noised(teacher.path, reached, batch)
        kappas = [self.guidance.learning(batch)]
        prediction = guided(nets["fake"], n.xt, n.t, batch.cond, kappas).predictions[0]
        weight = self.fake_weight(reached.x0, reached.x0, n.alpha, n.sigma)
        weight = weight * (share**-2).clamp(max=self.clip)
        learnt = share * prediction, target, weight
        loss = Loss(denoising(*learnt).mean())
        return paced(loss, nets, teacher, batch, n, learnt, self.guidance, share)

    def student_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The expert's loss, the KL direction on x_s; no graph but the one of its call.

        Args:
            rollout: the call, whose phase is meant.
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch, of which only the gradient has a meaning.

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        reached = self.reached(rollout, nets, batch)
        with torch.no_grad():
            n = self.noised(teacher.path, reached, batch).noised
            p = predict_at(nets, teacher, batch, n, self.guidance)
            weight = self.weight(reached.x0, p.real, p.alpha, p.sigma)
        return Loss(kl(reached.xs, p.real, p.fake, weight).mean())

    def reached(self, rollout: Rollout, nets: Nets, batch: Batch) -> Reached:
        """Where a call leads by one deterministic step to the end of its phase."""
        state = rollout.state(nets, batch)
        end = self.ends(state.path)[(rollout.k - 1) // self.each]
        if end == 0:
            return Reached(state.x0, None, state.x0)
        s = torch.full_like(state.t, end)
        return Reached(state.path.ddim(state.xt, state.x0, state.t, s), s, state.x0)

    def noised(self, path: NoisePath, reached: Reached, batch: Batch) -> Renoised:
        """The ends x_s at levels above s, with the targets of the fake score."""
        draws, x = need_draws(batch), reached.xs.detach()
        low = x.new_full((), path.t_min) if reached.s is None else reached.s
        high = torch.full_like(low, path.t_max)
        t = self.times.within(draws.uniform("t").to(low), low, high).to(x)
        eps = draws.normal("eps", x.shape[1:]).to(x)
        return renoise(path, x, eps, reached.s, t)


def _experts(student: nn.Module) -> nn.ModuleList:
    """The networks of the phases, in order."""
    (found,) = (module for module in student.modules() if isinstance(module, ExpertsNet))
    return found.nets
