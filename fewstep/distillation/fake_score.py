"""What the score-distillation methods share: samples, noising, and the fake score.

The fake score f_psi follows the student's own distribution: it learns to denoise generated
samples, and at its optimum is E[x | x_t] under the student. Methods differ only in what they do
with f_psi and the teacher f_phi at a noised sample.

A student of K calls is trained one call at a time (Zhou et al. 2025, few-step SiD,
https://arxiv.org/abs/2505.12674): x^(k), with a gradient through call k alone. Either k is drawn
anew for each step ("uniform": the mixture of all K outputs is matched to the data, by one fake
score), or it is always K ("final": what the user gets is matched, and nothing else).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.guidance import guided, is_zero
from fewstep.diffusion.noise_path import NoisePath, coefficients, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.time_distributions import LogNormal, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler, State
from fewstep.distillation.augment import Augment
from fewstep.distillation.guidance_scales import Guidance, Unguided
from fewstep.distillation.method import Loss, Nets, Turn, need_draws
from fewstep.distillation.pace import shortfall
from fewstep.losses.score import denoising, kl
from fewstep.losses.weight import EDMWeight, Weight

Matching = Literal["uniform", "final"]
Samples = Callable[[Nets, Batch], Tensor]
"""What makes samples (B, *) of the student, with a gradient, such as a `Rollout`."""


class NoisedSamples(NamedTuple):
    """Samples with noise: xt (B, *), their times t (B,), alpha and sigma (B, 1, ..., 1)."""

    xt: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor


class Predictions(NamedTuple):
    """The predictions of teacher and fake score at the same noised samples.

    real, fake and own: (B, *); `fake` and `own` differ only by guidance. alpha, sigma and
    precision_weight: (B, 1, ..., 1). features: (B, F, *), or None where they were not asked for.
    """

    real: Tensor
    """f_phi(x_t) with guidance kappa_4."""
    fake: Tensor
    """f_psi(x_t) with kappa_2, where it is compared with the teacher."""
    own: Tensor
    """f_psi(x_t) with kappa_3, where it is compared with the sample."""
    alpha: Tensor
    sigma: Tensor
    precision_weight: Tensor
    """e^-u with the log-variance u that the fake score gives its loss at t; 1 without one."""
    features: Tensor | None = None
    """The fake score's encoder features at x_t, where they were asked for."""


@dataclass(frozen=True)
class Rollout:
    """How training makes samples at one step: the output of call k of `sampler`."""

    sampler: Sampler
    k: int

    @classmethod
    def at(cls, step: int, sampler: Sampler, matching: Matching) -> Rollout:
        """The rollout of step `step`.

        k is the last call for "final"; for "uniform" it is drawn from 1 .. K as a pure function of
        the step, and so the same in all turns of a step, in every microbatch and in every process.
        ValueError for another `matching`.
        """
        if matching not in ("uniform", "final"):
            raise ValueError(f"matching is 'uniform' or 'final', got {matching!r}")
        if matching == "final" or sampler.calls == 1:
            return cls(sampler, sampler.calls)
        k = Draws(torch.tensor([step])).integers("rollout", sampler.calls)
        return cls(sampler, 1 + int(k))

    def __call__(self, nets: Nets, batch: Batch) -> Tensor:
        """x^(k): (B, *), with a gradient through call k of nets["student"]."""
        return self.state(nets, batch).x0

    def state(self, nets: Nets, batch: Batch) -> State:
        """Call k, with a gradient through it alone: its input, its time and where it leads."""
        student: Any = nets["student"]
        return self.sampler.state(self.k, student, batch.z, batch.cond, batch.draws)


class SharedRollout:
    """One rollout for both halves of a step: the fake score's, then the student's.

    The fake score learns on the samples without their graph, with draws under "fake"; the student
    takes them with it, and no call of its network is made again. Its weights do not change in
    between, so that its gradient is that of a rollout of its own on the same samples. The graphs
    of all parts of a batch are held at once.
    """

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.made: list[Tensor] = []

    def __repr__(self) -> str:
        return f"SharedRollout({self.rollout!r})"

    def turns(self, fake: FakeScore, guidance: Guidance, student: Turn) -> tuple[Turn, Turn]:
        """The fake score's turn and the student's, whose loss makes its samples by `self`."""
        learn = Turn("fake", partial(self._learn, fake, guidance), beside=("student",))
        return learn, student._replace(same=True)

    def _learn(
        self, fake: FakeScore, guidance: Guidance, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        x = self.rollout(nets, batch)
        self.made.append(x)
        own = batch._replace(draws=need_draws(batch).under("fake"))
        return fake.loss(lambda nets, batch: x.detach(), guidance, nets, teacher, own)

    def __call__(self, nets: Nets, batch: Batch) -> Tensor:
        """x^(k): (B, *), with the graph of the turn before if it recorded one."""
        x = self.made.pop(0) if self.made else None
        return x if x is not None and x.requires_grad else self.rollout(nets, batch)


def add_noise(
    path: NoisePath, x: Tensor, times: TimeLaw, batch: Batch, below: Tensor | None = None
) -> NoisedSamples:
    """Move samples to random noise levels.

    Args:
        path: the noise path.
        x: (B, *), clean samples.
        times: the distribution of t.
        batch: its draws "t" and "eps" are used.
        below: (B,), the largest t of each sample, if any.

    Returns: `NoisedSamples`, with one time for each sample and the dtype of x.

    Raises ValueError where the batch has no draws.
    """
    draws = need_draws(batch)
    u = draws.uniform("t")
    if below is None:
        t = times.quantile(u).to(x)
    else:
        t = times.within(u, torch.zeros_like(below), below).to(x)
    eps = draws.normal("eps", x.shape[1:]).to(x)
    alpha, sigma = coefficients(path, x, t)
    return NoisedSamples(perturb(path, x, eps, t), t, alpha, sigma)


def augment_samples(
    augment: Augment | None, x: Tensor, batch: Batch, name: str = "augment"
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Augmented samples, and the further arguments of a network that sees them.

    x: (B, *); name: the prefix of the draws. Returns (x, ()) where `augment` is None, else the
    moved pictures and ((B, 9) augmentation labels,).
    """
    if augment is None:
        return x, ()
    x, labels = augment(x, need_draws(batch).under(name))
    return x, (labels,)


def log_variance(nets: Nets, n: NoisedSamples, wanted: bool) -> Tensor:
    """u(t), the log-variance of the loss that the fake score estimates with its head.

    (B, 1, ..., 1) as alpha; zeros unless `wanted`. ValueError for a network without such a head.
    EDM2, Karras et al. 2024, https://arxiv.org/abs/2312.02696, section 2.4.
    """
    if not wanted:
        return torch.zeros_like(n.sigma)
    net: Any = nets["fake"]
    if not hasattr(net, "logvar"):
        raise ValueError(f"{type(net).__name__} has no log-variance head; say logvar=False")
    u: Tensor = net.logvar(n.t)
    return u.reshape(n.sigma.shape)


def paced(
    loss: Loss,
    nets: Nets,
    teacher: Denoiser,
    batch: Batch,
    n: NoisedSamples,
    learnt: tuple[Tensor, Tensor, Tensor],
    guidance: Guidance = Unguided(),
    share: Tensor | float = 1.0,
    more: Sequence[Tensor] = (),
) -> Loss:
    """The fake score's loss, with what nets["pace"] needs to know of it where there is one.

    The teacher is called once more, at the same noised samples, without a graph.

    Args:
        loss: the loss.
        nets: its networks.
        teacher: the teacher's denoiser.
        batch: its cond and draws are used.
        n: the noised samples that it is of.
        learnt: prediction (B, *), target (B, *) and weight of the loss, as `denoising` took them.
        guidance: the scale kappa_1 that the prediction has; the teacher is told no condition where
            it is asked without one in the student's loss too.
        share: what the prediction was multiplied by.
        more: further arguments of the denoisers, after cond.

    Returns: `loss`, with the logs "updates" and "avoidable" and the sums "pace".
    """
    if "pace" not in nets:
        return loss
    kappa = 0.0 if is_zero(guidance.scales(batch).real) else guidance.learning(batch)
    with torch.no_grad():
        (real,), _ = guided(teacher, n.xt, n.t, batch.cond, [kappa], more=more)
    prediction, target, weight = learnt
    sums = {"pace": shortfall(prediction, share * real, target, weight)}
    pace: Any = nets["pace"]
    logs = {"updates": pace.updates.float(), "avoidable": pace.avoidable}
    return Loss(loss.total, {**loss.logs, **logs}, {**loss.sums, **sums})


def generate(nets: Nets, sampler: Sampler, batch: Batch) -> Tensor:
    """The student's samples for this batch, with a gradient through the last call alone.

    Args:
        nets: networks with a "student".
        sampler: how it is sampled.
        batch: its z (B, *), cond and draws are used.

    Returns: (B, *).
    """
    return Rollout(sampler, sampler.calls)(nets, batch)


def predict(
    nets: Nets,
    teacher: Denoiser,
    batch: Batch,
    x: Tensor,
    times: TimeLaw,
    guidance: Guidance = Unguided(),
    tap: bool = False,
    logvar: bool = False,
) -> Predictions:
    """The predictions of teacher and fake score at x with noise, guided.

    Args:
        nets: networks with a "fake" score.
        teacher: the teacher's denoiser.
        batch: its cond and draws are used.
        x: (B, *), samples of the student.
        times: the distribution of the noise levels.
        guidance: the scales kappa_2 .. kappa_4.
        tap: also return the features of the fake score's encoder.
        logvar: weigh by the fake score's log-variance head; otherwise `precision_weight` is 1.

    Returns: `Predictions`, with gradients through x_t and both networks' inputs unless the caller
    disables them.

    Raises ValueError where the batch has no draws, where guidance meets no conditions, and where
    the fake score has no encoder features or head that are asked for.
    """
    n = add_noise(teacher.path, x, times, batch)
    return predict_at(nets, teacher, batch, n, guidance, tap, logvar)


def predict_at(
    nets: Nets,
    teacher: Denoiser,
    batch: Batch,
    n: NoisedSamples,
    guidance: Guidance = Unguided(),
    tap: bool = False,
    logvar: bool = False,
) -> Predictions:
    """As `predict`, at samples that have their noise already."""
    kappas = guidance.scales(batch)
    (real,), _ = guided(teacher, n.xt, n.t, batch.cond, [kappas.real])
    net = nets["fake"]
    (fake, own), features = guided(net, n.xt, n.t, batch.cond, [kappas.fake, kappas.own], tap)
    precision_weight = (-log_variance(nets, n, logvar)).exp()
    return Predictions(real, fake, own, n.alpha, n.sigma, precision_weight, features)


def kl_direction(
    nets: Nets,
    teacher: Denoiser,
    batch: Batch,
    x: Tensor,
    times: TimeLaw,
    weight: Weight,
    guidance: Guidance = Unguided(),
) -> Tensor:
    """The loss whose gradient pushes x along w (f_psi - f_phi), as KL(student || teacher) has it.

    Args:
        nets, teacher, batch, x, times, guidance: as of `predict`; x brings the student's gradient,
            teacher and fake score run without one.
        weight: w, of the teacher's prediction.

    Returns: (), the mean over the batch of `fewstep.losses.score.kl`; its value means nothing.

    Raises ValueError where the batch has no draws, or guidance meets no conditions.
    """
    with torch.no_grad():
        p = predict(nets, teacher, batch, x, times, guidance)
        scale = weight(x, p.real, p.alpha, p.sigma)
    return kl(x, p.real, p.fake, scale).mean()


@torch.no_grad()
def augmentation(
    x: Tensor,
    t: Tensor,
    kappa: float,
    times: TimeLaw,
    weight: Weight,
    teacher: Denoiser,
    batch: Batch,
) -> Tensor:
    """The half of guided matching that is guidance alone: w (kappa - 1) (f_0 - f_c).

    It is the gradient of -(kappa - 1) E log q(c | x_t) in x, but for alpha^2 / sigma^2. Decoupled
    DMD, Liu et al. 2025, https://arxiv.org/abs/2511.22677.

    Args:
        x: (B, *), samples of the student.
        t: (B,), the time of the call that made them: only levels below it are visited.
        kappa: guidance scale; 1: zeros, and no call.
        times: the law of the noise levels, cut at t.
        weight: w.
        teacher: the teacher's denoiser.
        batch: its cond is used, and its draws under "augmentation".

    Returns: (B, *), to be pushed on x. ValueError where guidance meets no conditions.
    """
    if kappa == 1:
        return torch.zeros_like(x)
    own = batch._replace(draws=need_draws(batch).under("augmentation"))
    xt, level, alpha, sigma = add_noise(teacher.path, x, times, own, below=t)
    (told, free), _ = guided(teacher, xt, level, batch.cond, [1.0, 0.0])
    return weight(x, told, alpha, sigma) * (kappa - 1) * (free - told)


@dataclass(frozen=True)
class FakeScore:
    """How nets["fake"] learns to denoise the student's samples.

    Attributes:
        times: the distribution of its noise levels.
        weight: w, the weight of its loss by noise level.
        augment: how samples are moved first, for a network with inputs for augmentation labels.
        logvar: learn the log-variance u of the loss with the network's head `logvar(t)`.

    The loss is E e^-u w |f_psi(x_t) - x|^2 + u, with u = 0 without `logvar`. Log-normal times and
    EDM's weight are the defaults, Karras et al. 2022, https://arxiv.org/abs/2206.00364, table 1.
    """

    times: TimeLaw = LogNormal()
    weight: Weight = EDMWeight()
    augment: Augment | None = None
    """How generated samples are moved first, for a network that has inputs for it."""
    logvar: bool = False
    """Learn the loss's own size u with the network's head `logvar(t)`: e^-u loss + u."""

    def turn(self, sampler: Sampler | Samples, guidance: Guidance = Unguided()) -> Turn:
        """The update of the fake score on samples of the student.

        sampler: what makes them of nets and batch, such as a `Rollout`, or a sampler, of which all
        calls are made; guidance: its scale kappa_1 is used, with conditions dropped at random
        where it asks for that.
        """
        rollout = Rollout(sampler, sampler.calls) if isinstance(sampler, Sampler) else sampler
        return Turn("fake", partial(self.loss, rollout, guidance))

    def loss(
        self, rollout: Samples, guidance: Guidance, nets: Nets, teacher: Denoiser, batch: Batch
    ) -> Loss:
        """The denoising loss on samples of the student, which carry no gradient.

        rollout: makes them, as a `Rollout` does or otherwise.
        """
        with torch.no_grad():
            x = rollout(nets, batch)
            x, labels = augment_samples(self.augment, x, batch)
        n = add_noise(teacher.path, x, self.times, batch)
        kappas = [guidance.learning(batch)]
        (prediction,), _ = guided(nets["fake"], n.xt, n.t, batch.cond, kappas, more=labels)
        u = log_variance(nets, n, self.logvar)
        weight = self.weight(x, x, n.alpha, n.sigma) * (-u).exp()
        loss = Loss(denoising(prediction, x, weight).mean() + u.mean())
        learnt = prediction, x, weight
        return paced(loss, nets, teacher, batch, n, learnt, guidance, more=labels)
