"""Flash Diffusion (Chadebec et al. 2024), https://arxiv.org/abs/2406.02347.

The student predicts in one call what the teacher's solver makes of the same noised data, and is
kept sharp by two further losses that come in stage by stage:

    L = E d(G(x_t, t), ODE(x_t, t))  +  gan L_GAN  +  dmd L_DMD,

with x_t made of data, but pure noise at the first time. ODE is a solver on K times, from t on,
guided by a scale that is drawn anew in each step. t is one for all samples of a step, on the
solver's ladder of K, and drawn from a mixture with a peak at each of the student's J times,

    p(i) ~ sum_j w_j exp(-(i - j K / J)^2 / width),    i = 0, ..., K - 1 from the noisiest on,

whose weights w change by stage: from the less noisy half to all four alike, and then for the first
call. The GAN reads the frozen teacher's features of samples and data, with noise of one of four
levels, by least squares. The KL direction of DMD (https://arxiv.org/abs/2311.18828) has here a
fake score of its own, as it should; the published code takes the student for it, which is a
denoiser of its own samples no longer.

The defaults are the published ones, but for `stage_steps` (5,000), the range of the guidance scale
(3 to 13), and d, which is LPIPS of decoded crops there: `PictureFeatures` are such distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import NoisePath, coefficients
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun, MultiStep
from fewstep.diffusion.time_distributions import Discrete, Karras, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.call_inputs import call_input, require_few_steps
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.fake_score import FakeScore, kl_direction
from fewstep.distillation.feature_distance import AnyDistance, sample_distance
from fewstep.distillation.guidance_scales import Kappas, Unguided
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_data, need_draws
from fewstep.losses.distance import SquaredL2
from fewstep.losses.weight import L1, Weight


@dataclass(frozen=True)
class FlashDiffusion(Method):
    """Flash Diffusion: the fake score, the discriminator and the student, as the stage needs them.

    It needs a teacher with encoder features (`fewstep.diffusion.encoder_features`), and data.
    ValueError for values that do not fit one another. Chadebec et al. 2024,
    https://arxiv.org/abs/2406.02347.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = FewStep(t_init=2.5, steps=4)
    """A `FewStep` of J calls."""
    teacher_times: int = 32
    """K, the times of the teacher's solver, spaced as the student's; a multiple of J."""
    width: float = 0.5
    """Width of the peaks of the law of times: twice their variance, in steps of the solver."""
    shares: tuple[tuple[float, ...], ...] = (
        *((0.0, 0.0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3)),
        *((0.25, 0.25, 0.25, 0.25), (0.4, 0.2, 0.2, 0.2)),
    )
    """w in each stage, one of each call, the noisiest first."""
    gan: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)
    """Weight of the adversarial loss in each stage."""
    dmd: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7)
    """Weight of the KL direction in each stage."""
    stage_steps: int = 450
    """Steps of a stage; the last one goes on."""
    solver: Literal["ddim", "heun", "dpm++", "unipc"] = "dpm++"
    """How the teacher steps: `Heun` of order 1 or 2, or `MultiStep` of order 2 (unipc: 3)."""
    kappa: tuple[float, float] = (1.0, 1.0)
    """The least and largest guidance scale of the teacher, part of the result."""
    distance: AnyDistance = SquaredL2()
    """d: of the samples over their dimensions, of pictures in features, or in the teacher's."""
    judge: Discriminator = Discriminator(Discrete((0.1, 0.7, 1.6, 4.1)), loss="least_squares")
    """What tells samples from data; its times are those published, as sigmas."""
    times: TimeLaw = Karras(tmax=800.0)
    """Noise levels of the KL direction."""
    weight: Weight = L1()
    """w of the KL direction; L1 is 1 / mean |x - f_phi|."""
    fake: FakeScore = FakeScore()
    """How the fake score learns: the noise levels and the weight of its loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sampler = require_few_steps(self, self.sampler)
        if sampler.times or self.teacher_times % sampler.steps or self.width <= 0:
            raise ValueError(
                "FlashDiffusion.sampler is a FewStep(t_init, steps, noise, rho), teacher_times a "
                f"multiple of its steps, and width > 0; got {sampler}, {self.teacher_times} and "
                f"{self.width:g}"
            )
        lengths = {len(self.shares), len(self.gan), len(self.dmd)}
        if lengths != {max(lengths)} or not self.shares or self.stage_steps < 1:
            raise ValueError(
                "FlashDiffusion has shares, gan and dmd of every stage, and stage_steps >= 1; got "
                f"{len(self.shares)}, {len(self.gan)} and {len(self.dmd)} of them, and "
                f"{self.stage_steps}"
            )
        for w in self.shares:
            if len(w) != sampler.steps or min(w) < 0 or sum(w) <= 0:
                raise ValueError(
                    f"FlashDiffusion.shares are weights of the sampler's {sampler.steps} calls in "
                    f"each stage, got {w}"
                )
        if min(*self.gan, *self.dmd) < 0 or self.judge.features == "fake":
            raise ValueError(
                "FlashDiffusion.gan and dmd are 0 or more, and its judge reads no fake score that "
                f"it trains; got {self.gan}, {self.dmd} and {self.judge.features!r}"
            )
        if self.kappa[0] > self.kappa[1]:
            raise ValueError(f"FlashDiffusion.kappa is two scales in order, got {self.kappa}")

    @property
    def couples_samples(self) -> bool:
        """Whether the judge's loss of a sample is weighted by the mean over the batch."""
        return self.judge.couples_samples

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, and a fake score and what judges, where any stage has them."""
        nets = super().init(teacher, net)
        if max(self.gan) > 0:
            self.judge.equipped(nets, teacher)
        if max(self.dmd) == 0 and self.judge.features != "frozen_fake":
            del nets["fake"]
        return nets

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of each network that the stage has a use for, the student last."""
        stage, index, kappa = self.drawn(step)
        student = Turn("student", partial(self.student_loss, stage, index, kappa))
        turns = [student]
        if self.gan[stage] > 0:
            turns.insert(0, Turn("discriminator", partial(self.judge_loss, index)))
        if self.dmd[stage] > 0:
            made = partial(self.made, index)
            turns.insert(0, Turn("fake", partial(self.fake.loss, made, Unguided())))
        return turns

    def law(self, stage: int) -> Tensor:
        """p of the teacher's times in a stage, from the noisiest on: (K,)."""
        weights = torch.tensor(self.shares[stage], dtype=torch.float64)
        stride = self.teacher_times // len(weights)
        i = torch.arange(self.teacher_times, dtype=torch.float64)
        peaks = (-((i[:, None] - stride * torch.arange(len(weights))) ** 2) / self.width).exp()
        mass = peaks @ weights
        return mass / mass.sum()

    def drawn(self, step: int) -> tuple[int, int, float]:
        """The stage of a step, the number of its time, and its guidance scale.

        They are functions of the step, and so the same in all its turns, in every part of a batch
        and in every process.
        """
        stage = min(step // self.stage_steps, len(self.shares) - 1)
        draws, (low, high) = Draws(torch.tensor([step])), self.kappa
        u = draws.uniform("time", torch.float64)
        index = int((self.law(stage).cumsum(0)[:-1] <= u).sum())
        return stage, index, low + (high - low) * float(draws.uniform("kappa"))

    def ladder(self, path: NoisePath) -> list[float]:
        """The teacher's times, from the noisiest on."""
        sampler = require_few_steps(self, self.sampler)
        return replace(sampler, steps=self.teacher_times).ladder(path)

    def noised(self, index: int, path: NoisePath, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_t (B, *) of data at the time of this number, and the time (B,)."""
        x0, sampler = need_data(self, batch), require_few_steps(self, self.sampler)
        t = x0.new_full((len(x0),), self.ladder(path)[index])
        return call_input(sampler, path, x0, batch.z, t), t

    def made(self, index: int, nets: Nets, batch: Batch) -> Tensor:
        """The student's samples, (B, *)."""
        student: Any = nets["student"]
        return student(*self.noised(index, student.path, batch), batch.cond)  # type: ignore[no-any-return]

    @torch.no_grad()
    def target(self, index: int, kappa: float, teacher: Denoiser, batch: Batch) -> Tensor:
        """Where the teacher's solver leads from x_t: (B, *)."""
        xt, t = self.noised(index, teacher.path, batch)
        rest = self.ladder(teacher.path)[index:]
        times = Discrete(tuple(reversed(rest)))
        solver: Sampler
        if self.solver in ("ddim", "heun"):
            solver = Heun(times, len(rest), 1 if self.solver == "ddim" else 2)
        else:
            kind: Any = self.solver
            solver = MultiStep(times, len(rest), kind, order=3 if kind == "unipc" else 2)
        solver = solver if kappa == 1 else CFG(solver, kappa)
        _, sigma = coefficients(teacher.path, xt, t)
        return solver(teacher, xt / sigma, batch.cond)  # it starts from sigma times its noise

    def judge_loss(self, index: int, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The discriminator's loss of samples and data; logs as of `Discriminator.judge`."""
        with torch.no_grad():
            x = self.made(index, nets, batch)
        pair = self.judge.pair(teacher.path, x, need_data(self, batch), batch)
        return self.judge.judge(nets, teacher, batch, pair, batch.cond)

    def student_loss(
        self, stage: int, index: int, kappa: float, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        """The student's loss, of up to three terms.

        Args:
            stage: the number of the stage, whose weights count.
            index: the number of the time, 0 for pure noise.
            kappa: the guidance scale of the teacher.
            nets: the "student", and the "fake" score and the "discriminator" where they are used.
            teacher: the teacher's denoiser.
            batch: x0 (B, *), z, cond and draws.

        Returns: the mean over the batch; logs "regression", and "score" and "gan_loss" where the
        stage has them.

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        x, target = self.made(index, nets, batch), self.target(index, kappa, teacher, batch)
        total = sample_distance(self.distance, teacher, x, target, batch, batch.cond).mean()
        logs = {"regression": total}
        if self.dmd[stage] > 0:
            guidance = Kappas(real=kappa)
            logs["score"] = kl_direction(
                nets, teacher, batch, x, self.times, self.weight, guidance
            )
            total = total + self.dmd[stage] * logs["score"]
        if self.gan[stage] > 0:
            apart = batch._replace(draws=need_draws(batch).under("gan"))
            n = self.judge.noised(teacher.path, x, apart)
            gan = self.judge.fool(nets, teacher, apart, n, batch.cond)
            logs["gan_loss"] = gan.gan_loss
            total = total + self.gan[stage] * gan.total
        return Loss(total, logs)
