"""Continuous-time distribution matching (Liu et al. 2026), https://arxiv.org/abs/2605.06376.

DMD looks at a student of K calls at the K times of its sampler alone. Here each step of training
draws a grid of its own: K in 1 .. `longest`, and K - 1 times between the sampler's start and its
end, uniform in flow time. A deterministic rollout (`FewStep`, noise "ddim") runs along it to one
call k of its calls, drawn as well, and the output x of that call is pushed by three terms:

    matching         w (f_psi - f_phi)(x_tau),                      all noise levels tau
    augmentation     w (kappa - 1) (f_0 - f_c)(x_tau),              levels below t_k
    off trajectory   w (f_psi - f_phi)(y_tau),   y = g(x', t'),     all noise levels

The first two are decoupled DMD's (Liu et al. 2025, https://arxiv.org/abs/2511.22677). In the third
the student is asked from a point that no rollout visits, the state that call k would have been at
another time t', with its prediction and its noise as they are,

    x' = alpha_t' x + sigma_t' eps,    eps = (x_t - alpha_t x) / sigma_t,

which has no gradient; y alone is pushed. So the student is told what to do at all times, and after
its own errors. Each term has noise levels, noise, and a normaliser 1 / mean |x - f_phi| of its
own.

The fake score learns from outputs of random calls on random grids, and after each step a small
share of the student's weights is mixed into it (read in the released code). There the time t' may
lie on either side of t_k. The paper's text was not at hand: what is published is told as that code
has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.noise_path import VP, NoisePath, same_shape
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler, State
from fewstep.distillation.call_inputs import require_trajectory
from fewstep.distillation.fake_score import FakeScore, Rollout, augmentation, predict
from fewstep.distillation.flow_maps import follow
from fewstep.distillation.guidance_scales import Unguided
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_draws
from fewstep.distillation.pace import Updates
from fewstep.losses.score import kl
from fewstep.losses.weight import L1, EDMWeight, Weight


class Grid(NamedTuple):
    """The calls of one step of training: flow times as shares of the sampler's start, from 1 on.

    k: the call that is trained, from 1.
    """

    shares: tuple[float, ...]
    k: int

    def rollout(self, start: float, path: NoisePath) -> Rollout:
        """The rollout to call k from the time `start`; timesteps are whole, and each is there
        once.
        """
        first = torch.tensor(start, dtype=torch.float64)
        times = path.time_of(torch.tensor(self.shares) * path.flow_time(first)).tolist()
        if isinstance(path, VP):
            times = [float(round(t)) for t in times]
        times[0] = start
        distinct = tuple(sorted(set(times), reverse=True))
        return Rollout(FewStep(noise="ddim", times=distinct), min(self.k, len(distinct)))


@dataclass(frozen=True)
class CDM(Method):
    """CDM: `ratio` updates of the fake score, then one of the student, on a grid of their own.

    It needs a teacher and no data; with kappa other than 1 a teacher that knows conditions and
    has learned to do without. ValueError for a sampler that is not deterministic, and for values
    out of range. Liu et al. 2026, https://arxiv.org/abs/2605.06376.
    """

    sampler: Sampler = FewStep(2.5, 4, "ddim")
    """A `FewStep` with noise "ddim"; training has its start, and grids of its own."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1 leaves augmentation out (released:
    7 times the augmentation, which is 8)."""
    longest: int = 8
    """The largest number of calls of a training grid, from 1 to which it is uniform (published:
    28, for more time in rollouts)."""
    between: tuple[float, float] = (0.25, 0.95)
    """Where the later times of a grid are drawn, as shares of the start's flow time."""
    times: TimeLaw = Karras(tmax=500.0)
    """Noise levels of both matching terms, up to where the sampler starts."""
    weight: Weight = L1(0.1)
    """w, the weight of all terms by noise level."""
    off: float = 1.0
    """Weight of the term off the trajectory; 0 leaves it out."""
    fake: FakeScore = FakeScore(Karras(), EDMWeight())
    """How the fake score learns: the noise levels and the weight of its loss."""
    ratio: Updates = 2
    """Updates of the fake score for one of the student."""
    pull: float = 0.999
    """What the fake score keeps of its weights after each step, the rest being the student's; 1
    leaves it alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_trajectory(self, self.sampler)
        if self.longest < 1 or self.off < 0 or not 0 < self.pull <= 1:
            raise ValueError(
                "CDM needs longest >= 1, off >= 0 and 0 < pull <= 1, got "
                f"{self.longest}, {self.off:g} and {self.pull:g}"
            )
        if not 0 < self.between[0] < self.between[1] < 1:
            raise ValueError(
                f"CDM.between is two increasing shares between 0 and 1, got {self.between}"
            )

    @property
    def start(self) -> float:
        """t_1."""
        assert isinstance(self.sampler, FewStep)
        return self.sampler.t_init

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The "student" and the "fake" score; ValueError where weights cannot be mixed."""
        nets = super().init(teacher, net)
        shapes = [[p.shape for p in one.parameters()] for one in nets.values()]
        if self.pull < 1 and shapes[0] != shapes[1]:
            raise ValueError(
                "CDM mixes weights of the student into the fake score, but they are other "
                "networks; say pull=1.0"
            )
        return nets

    def grid(self, step: int) -> Grid:
        """The grid of a step: the same in all its turns, microbatches and processes."""
        draws = Draws(torch.tensor([step]))
        calls = 1 + int(draws.integers("calls", self.longest))
        low, high = self.between
        shares = [low + (high - low) * float(draws.uniform(f"share{i}")) for i in range(1, calls)]
        return Grid((1.0, *sorted(shares, reverse=True)), 1 + int(draws.integers("call", calls)))

    def turns(self, step: int) -> Sequence[Turn]:
        """`ratio` updates of the fake score, then one of the student, on one grid."""
        grid = self.grid(step)
        fake = Turn("fake", partial(self.fake_loss, grid))
        return *self.fake_updates(fake), Turn("student", partial(self.student_loss, grid))

    def after_step(self, step: Step) -> None:
        """Some of the student's weights are mixed into the fake score."""
        super().after_step(step)
        if self.pull < 1:
            follow(step, self.pull, "fake")

    def fake_loss(self, grid: Grid, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The fake score's denoising loss on outputs of call k, which carry no gradient."""
        rollout = grid.rollout(self.start, teacher.path)
        return self.fake.loss(rollout, Unguided(), nets, teacher, batch)

    def student_loss(self, grid: Grid, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss, the three terms.

        Args:
            grid: says which call is trained.
            nets: the "student" and the "fake" score.
            teacher: the teacher's denoiser.
            batch: z (B, *), cond and draws of the samples.

        Returns: the mean over the batch; logs "matching", "augmentation" and "off_trajectory", the
        mean absolute directions, and "spread", the mean variance over the numbers of a sample.

        Raises ValueError where the batch has no draws, or guidance meets no conditions.
        """
        state = grid.rollout(self.start, teacher.path).state(nets, batch)
        x = state.x0
        own = self.matching(x, nets, teacher, batch)
        reward = augmentation(x, state.t, self.kappa, self.times, self.weight, teacher, batch)
        zero = torch.zeros_like(x)
        total = kl(x, zero, own + reward).mean()
        logs = {
            "matching": own.abs().mean(),
            "augmentation": reward.abs().mean(),
            "spread": x.detach().flatten(1).var(1, correction=0).mean(),
        }
        if self.off:
            elsewhere = batch._replace(draws=need_draws(batch).under("off"))
            y = self.elsewhere(state, nets, elsewhere)
            push = self.matching(y, nets, teacher, elsewhere)
            total = total + self.off * kl(y, zero, push).mean()
            logs["off_trajectory"] = push.abs().mean()
        return Loss(total, logs)

    @torch.no_grad()
    def matching(self, x: Tensor, nets: Nets, teacher: Denoiser, batch: Batch) -> Tensor:
        """w (f_psi - f_phi) at x with noise: (B, *)."""
        p = predict(nets, teacher, batch, x, self.times)
        same_shape(x=x, real=p.real, fake=p.fake)
        return self.weight(x, p.real, p.alpha, p.sigma) * (p.fake - p.real)

    def elsewhere(self, state: State, nets: Nets, batch: Batch) -> Tensor:
        """y, the student's output from x' at a time t' of its own for each sample: (B, *)."""
        path = state.path
        share = 0.02 + 0.96 * need_draws(batch).uniform("share").to(state.t)
        t = path.time_of(share * path.flow_time(torch.full_like(share, self.start)))
        moved = path.ddim(state.xt, state.x0.detach(), state.t, t)
        student: Any = nets["student"]
        return guided(student, moved, t, batch.cond, [1.0]).predictions[0]
