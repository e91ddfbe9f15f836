"""The discriminator: what tells the student's samples from data, for every adversarial method.

    l = head(features(noised(x, t), t, cond))        logits of "real"

Published systems differ in a few choices, which are the fields of `Discriminator`:

    features   "fake"      the encoder of the fake score, trained by both of its losses: SiDA (Zhou
                           et al. 2024, https://arxiv.org/abs/2410.14919), DMD2 (Yin et al. 2024,
                           https://arxiv.org/abs/2405.14867)
               "teacher"   the frozen teacher, at its encoder or after several `layers`, with
                           heads that alone are trained: LADD (Sauer et al. 2024,
                           https://arxiv.org/abs/2403.12015)
               "frozen_fake"  the fake score as it is, with heads that alone are trained: ASD (Yang
                           et al. 2025, https://arxiv.org/abs/2511.01419)
               a frozen network that reads pictures (`fewstep.distillation.pictures`), with heads
                           that alone are trained: ADD (Sauer et al. 2023,
                           https://arxiv.org/abs/2311.17042)
               "own"       a network of its own, which starts as the fake score does:
                           SDXL-Lightning (Lin et al. 2024, https://arxiv.org/abs/2402.13929)
    joint      whether it also reads the state that a sample was made from, as SDXL-Lightning's
               does, so that it knows joint laws and not marginal ones alone
    pool       means over channels or places, without parameters, or a learned head
    loss       `fewstep.losses.adversarial`, with gradient penalties
    times      the noise levels it judges at, or none
    mismatch   real samples under the condition of others, as a part of what it calls generated:
               Diffusion2GAN (Kang et al. 2024, https://arxiv.org/abs/2405.05967)

The heads, or the network of its own, are nets["discriminator"]. Real and generated samples have
the same times and conditions, and the same noise if nothing else is said (`share_noise`). The
discriminator's side (`judge`) keeps no graph of the student; the student's side (`fool`) has a
gradient through x_t alone, as the loop trains nothing else in its turn, and through what is frozen
too. Another source of features is one more case of `features` and `read`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.diffusion.encoder_features import layer_features, require_encoder_features
from fewstep.diffusion.guidance import Scale, is_zero
from fewstep.diffusion.noise_path import NoisePath, coefficients, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.time_distributions import LogNormal, TimeLaw
from fewstep.diffusion.types import Batch, Cond, Denoiser
from fewstep.distillation.augment import Augment
from fewstep.distillation.discriminator_head import DenoiserWithHead, Heads, head_shape, joined
from fewstep.distillation.fake_score import NoisedSamples, Rollout, add_noise, augment_samples
from fewstep.distillation.method import Loss, Nets, Turn, need_data, need_draws
from fewstep.distillation.pictures import PictureFeatures, pictures_of
from fewstep.losses import adversarial
from fewstep.losses.adversarial import Adversarial, Average, GradientPenalty, Pool, averaged
from fewstep.losses.weight import Power, Weight

Features = Literal["fake", "teacher", "frozen_fake", "own"]
FROZEN = ("teacher", "frozen_fake")
"""Those of which the heads alone are trained."""


State = tuple[Tensor, Tensor]
"""A state that samples are made from: x_t (B, *) and its time (B,)."""


class Pair(NamedTuple):
    """Generated and real samples with the same noise, and what else a network is told of them.

    x: (B, *), the generated ones as they are judged, without noise; fake, real: with noise;
    fake_labels, real_labels: their augmentation labels ((B, 9),), or (). beside: the state that
    both were made from, where the discriminator reads it.
    """

    x: Tensor
    fake: NoisedSamples
    real: NoisedSamples
    fake_labels: tuple[Tensor, ...]
    real_labels: tuple[Tensor, ...]
    beside: State | None = None


class Fooled(NamedTuple):
    """The student's side: total (), its weighted adversarial loss; gan_loss (), the plain mean;
    logits (B, N), of the generated samples.
    """

    total: Tensor
    gan_loss: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Discriminator:
    """How student and data are told apart; the defaults are close to LADD's.

    Attributes:
        times: the distribution of the noise levels that it judges at; None: clean samples.
        features: what it reads: the encoder of the "fake" score, the frozen "teacher", the
            "frozen_fake" score, a network of its "own", or a frozen network of pictures.
        layers: names of modules of what is frozen whose outputs are read, each with a head, as in
            `layer_features`; they have the shape of its encoder features. (): those alone.
        pool: how features make logits: their mean over "channels" or "space", or a "learned" head.
        loss: the adversarial loss of both sides.
        penalty: gradient penalties, added to the loss of each sample before it is weighted.
        judging: w_D, the weight of its loss by noise level.
        average: whether weights multiply the loss of the whole "batch", or of each "sample".
        augment: how real and generated samples are moved first, each by itself.
        joint: whether its head, a learned one that is not the fake score's, also reads the state
            that a sample was made from; where it is not told of one, zeros stand there.
        mismatch: the share, among generated samples, of real ones under another condition.
        share_noise: whether a real and a generated sample have the same noise; the optimum of the
            relativistic loss is log r where they have not, and depends on the pairing where so.
        heads: how many discriminators with heads of their own read the same frozen features.
        head: which of them this is, from 0.

    Raises ValueError for choices that are not there, and for those that leave nothing to train.
    """

    times: TimeLaw | None = LogNormal()
    features: Features | PictureFeatures = "teacher"
    layers: tuple[str, ...] = ()
    pool: Pool = "learned"
    loss: Adversarial = "nonsaturating"
    penalty: GradientPenalty = GradientPenalty()
    judging: Weight = Power()
    average: Average = "sample"
    augment: Augment | None = None
    joint: bool = False
    mismatch: float = 0.0
    share_noise: bool = True
    heads: int = 1
    head: int = 0

    def __post_init__(self) -> None:
        adversarial.adversarial(self.loss)
        frozen, looks = self.frozen, isinstance(self.features, PictureFeatures)
        if not frozen and self.features not in ("fake", "own"):
            raise ValueError(
                f"features is 'fake', 'teacher', 'frozen_fake' or 'own', got {self.features!r}"
            )
        if looks and (self.times is not None or self.layers or self.joint or self.mismatch):
            raise ValueError(
                "a discriminator of pictures says times=None, and has no layers, joint states or "
                f"mismatch; got {self}"
            )
        if self.penalty.of == "features" and not frozen:
            raise ValueError(
                "penalty.of='features' is for heads on a frozen network, and "
                f"features={self.features!r} is trained; say of='input'"
            )
        if frozen and self.pool != "learned":
            raise ValueError(
                f"of a frozen network the head alone can learn, and pool={self.pool!r} has "
                "nothing to train; say pool='learned'"
            )
        if self.layers and not frozen:
            raise ValueError(
                f"layers are those of a frozen network, and features={self.features!r} reads none"
            )
        if not 0 <= self.head < self.heads or (self.heads > 1 and not frozen):
            raise ValueError(
                "several heads are on frozen features, and head is one of them, from 0; got "
                f"features={self.features!r}, heads={self.heads} and head={self.head}"
            )
        if self.joint and (self.features == "fake" or self.pool != "learned"):
            raise ValueError(
                "a joint discriminator has features='teacher' or 'own' and pool='learned', got "
                f"{self.features!r} and {self.pool!r}"
            )
        if not 0 <= self.mismatch < 1:
            raise ValueError(f"Discriminator.mismatch is in [0, 1), got {self.mismatch:g}")

    @property
    def frozen(self) -> bool:
        """Whether its heads alone are trained."""
        return isinstance(self.features, PictureFeatures) or self.features in FROZEN

    @property
    def couples_samples(self) -> bool:
        """Whether a sample's loss depends on the rest of its batch: where weights are averaged.

        Pairs of the relativistic loss are of one index, and are in one part of a batch.
        """
        return self.average == "batch"

    @property
    def net(self) -> str:
        """The name of the network that is trained to judge."""
        return "fake" if self.features == "fake" else "discriminator"

    def equipped(self, nets: Nets, teacher: Denoiser | None = None) -> Nets:
        """`nets` with what judges: a head on the fake score, heads for the teacher, or a network.

        A network of its own starts as the fake score, or as the student where there is none. For
        a method's init; changes `nets` in place. Raises ValueError where features need a teacher
        and there is none, and where there is no shape of features for a head.
        """
        if self.frozen:
            shapes: Sequence[tuple[int, ...]]
            if isinstance(self.features, PictureFeatures):
                net, shapes = next(iter(nets.values())), self.features.shapes
            else:
                net = self._frozen(nets, teacher)
                require_encoder_features(net)
                shapes = [head_shape(net, self.joint)] * (len(self.layers) or 1)
            like = next(net.parameters())
            nets["discriminator"] = Heads([*shapes] * self.heads, like)
            return nets
        if self.features == "own":
            nets["discriminator"] = deepcopy(nets["fake" if "fake" in nets else "student"])
        if self.pool == "learned":
            nets[self.net] = DenoiserWithHead(nets[self.net], self.joint)
        return nets

    def condition(self, batch: Batch, *kappas: Scale) -> Cond:
        """The condition it judges by: none of a fake score that is used at scale 0 alone."""
        unheard = self.features == "fake" and all(is_zero(kappa) for kappa in kappas)
        return None if unheard else batch.cond

    def noised(self, path: NoisePath, x: Tensor, batch: Batch) -> NoisedSamples:
        """Samples (B, *) at the noise levels it judges at, or at time t_min without noise."""
        if self.times is not None:
            return add_noise(path, x, self.times, batch)
        t = torch.full((len(x),), path.t_min, dtype=x.dtype, device=x.device)
        return NoisedSamples(x, t, *coefficients(path, x, t))

    def pair(self, path: NoisePath, x: Tensor, x0: Tensor, batch: Batch) -> Pair:
        """Generated samples x and data x0, both (B, *), augmented, at the same times.

        Inputs that an exact gradient penalty differentiates by ask for a gradient.
        """
        x, fake_labels = augment_samples(self.augment, x.detach(), batch)
        x0, real_labels = augment_samples(self.augment, x0, batch, "augment/real")
        fake = self.noised(path, x, batch)
        pair = self.compared(x, fake, fake._replace(xt=self._beside(path, x0, fake, batch)))
        return pair._replace(fake_labels=fake_labels, real_labels=real_labels)

    def compared(
        self, x: Tensor, fake: NoisedSamples, real: NoisedSamples, beside: State | None = None
    ) -> Pair:
        """Samples x (B, *) and data that have their noise already, and what both were made from.

        Inputs that an exact gradient penalty differentiates by ask for a gradient.
        """
        fake, real = self._input(fake, self.penalty.r2), self._input(real, self.penalty.r1)
        return Pair(x, fake, real, (), (), beside)

    def _input(self, n: NoisedSamples, penalty: float) -> NoisedSamples:
        return n._replace(xt=n.xt.detach().requires_grad_(penalty > 0 and self._exact))

    def logits(
        self,
        nets: Nets,
        teacher: Denoiser,
        xt: Tensor,
        t: Tensor,
        cond: Cond,
        *labels: Tensor,
        beside: State | None = None,
    ) -> Tensor:
        """Logits (B, N) of x_t (B, *) at t (B,), positive for real.

        labels: of an augmentation; beside: the state it was made from, for a joint
        discriminator. Raises ValueError where the network has no features.
        """
        if self.frozen:
            features = self.read(nets, teacher, xt, t, cond, *labels, beside=beside)
            return self.pooled(nets["discriminator"](features, self._first(features)))
        net = require_encoder_features(nets[self.net])
        more = {"beside": beside} if self.joint else {}
        return self.pooled(net.encode(xt, t, cond, *labels, **more))

    def _frozen(self, nets: Nets, teacher: Denoiser | None) -> Any:
        """The frozen network that has an encoder; ValueError where there is no teacher."""
        if self.features == "teacher" and teacher is None:
            raise ValueError("features='teacher' needs a teacher; say features='own'")
        return teacher if self.features == "teacher" else nets["fake"]

    def read(
        self,
        nets: Nets,
        teacher: Denoiser,
        xt: Tensor,
        t: Tensor,
        cond: Cond,
        *labels: Tensor,
        beside: State | None = None,
    ) -> list[Tensor]:
        """What heads take of what is frozen, (B, F, *) each; arguments as of `logits`."""
        if isinstance(self.features, PictureFeatures):
            return list(self.features(pictures_of(teacher, xt)))
        frozen = self._frozen(nets, teacher)
        features = self._read(frozen, xt, t, cond, *labels)
        if not self.joint:
            return features
        none: list[Any] = [None] * len(features)
        others = none if beside is None else self._read(frozen, *beside, cond, *labels)
        return [joined(*both) for both in zip(features, others, strict=True)]

    def _first(self, features: Sequence[Tensor]) -> int:
        """Which of all heads is the first of this one's."""
        return self.head * len(features)

    def _read(self, net: Any, *args: Any) -> list[Tensor]:
        if self.layers:
            return layer_features(net, self.layers, *args)
        return [require_encoder_features(net).encode(*args)]

    def pooled(self, features: Tensor) -> Tensor:
        """Features (B, F, *) as logits (B, N)."""
        return adversarial.logits(features, self.pool)

    def log_ratio(self, logit: Tensor) -> Tensor:
        """log q_t / p_t as its logits say it at the optimum, of any shape.

        Of the relativistic loss up to a constant. ValueError where the loss does not tell it.
        """
        known = adversarial.adversarial(self.loss).log_ratio
        if known is None:
            fitting = [name for name, one in adversarial.LOSSES.items() if one.log_ratio]
            raise ValueError(
                f"the logits of loss={self.loss!r} do not tell the density ratio; choose from "
                f"{', '.join(fitting)}"
            )
        return known(logit)

    def judge(
        self,
        nets: Nets,
        teacher: Denoiser,
        batch: Batch,
        pair: Pair,
        cond: Cond,
        on_fake: Tensor | None = None,
        factor: Tensor | float = 1.0,
        other: Cond = None,
        other_state: State | None = None,
    ) -> Loss:
        """The discriminator's loss.

        Args:
            nets: the networks.
            teacher: the teacher's denoiser.
            batch: its draws are used by a gradient penalty with a `step`.
            pair: what is judged.
            cond: by which condition.
            on_fake: the logits (B, N) of pair.fake, where they are known.
            factor: times w_D, (B, 1, ..., 1) or a number.
            other, other_state: a condition and a state for pair.real that are independent of it,
                where there is a `mismatch`.

        Returns: a `Loss`, the mean over the batch; logs "discriminator", "discriminator_accuracy",
        the share of samples (of pairs, where the loss pairs them) that are told right, and
        "penalty_real" and "penalty_fake" where there are any. Raises ValueError for an exact
        penalty of a network in parts.
        """
        self._require_whole(nets)
        at = partial(self._at, nets, teacher, pair.beside)
        judge_fake = partial(at, pair.fake.t, cond, pair.fake_labels)
        judge_real = partial(at, pair.real.t, cond, pair.real_labels)
        with self._differentiable_twice():
            on_real = judge_real(pair.real.xt)
            on_fake = judge_fake(pair.fake.xt) if on_fake is None else on_fake
        loss = adversarial.adversarial(self.loss)
        each = loss.discriminator(on_real, on_fake)
        if self.mismatch:
            if other is None and other_state is None:
                raise ValueError("mismatch needs samples with conditions; say mismatch=0.0")
            n, labels = pair.real, pair.real_labels
            wrong = self._at(nets, teacher, other_state, n.t, other, labels, n.xt)
            each = torch.lerp(each, loss.discriminator(on_real, wrong), self.mismatch)
        logs: dict[str, Tensor] = {}
        sides = {
            "real": (self.penalty.r1, judge_real, pair.real, pair.real_labels, on_real),
            "fake": (self.penalty.r2, judge_fake, pair.fake, pair.fake_labels, on_fake),
        }
        for name, (weight, judge, n, labels, logit) in sides.items():
            if not weight:
                continue
            draws = need_draws(batch).under("penalty")
            if self.penalty.of == "features":
                read = self.read(nets, teacher, n.xt, n.t, cond, *labels, beside=pair.beside)
                slope = self._steepness(nets, read, draws, name)
            else:
                noise = draws.normal(name, n.xt.shape[1:]).to(n.xt)
                slope = self.penalty(judge, n.xt, logit, noise)
            half = weight / 2 * slope
            each = each + half
            logs[f"penalty_{name}"] = half.mean()
        weight_d = self.judging(pair.x, pair.x, pair.fake.alpha, pair.fake.sigma) * factor
        total = averaged(each, weight_d, self.average).mean()
        if loss.paired:
            right = (on_real > on_fake).float().mean()
        else:
            right = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
        return Loss(total, {"discriminator": total, "discriminator_accuracy": right, **logs})

    def _steepness(
        self, nets: Nets, features: Sequence[Tensor], draws: Draws, name: str
    ) -> Tensor:
        """The penalty in the features (B, F, *) of each head, the mean over heads: (B,)."""
        heads, first, slopes = nets["discriminator"], self._first(features), []
        for k, one in enumerate(features):

            def judge(f: Tensor, k: int = k) -> Tensor:
                out: Tensor = heads([f], first + k)
                return out

            f = one.detach().requires_grad_()
            noise = draws.normal(f"{name}{k}", f.shape[1:]).to(f)
            slopes.append(self.penalty(judge, f, judge(f), noise))
        return torch.stack(slopes).mean(0)

    @property
    def _exact(self) -> bool:
        """Whether there is a penalty by the exact gradient in x_t."""
        p = self.penalty
        return bool(p.r1 or p.r2) and not p.step and p.of == "input"

    def _differentiable_twice(self) -> AbstractContextManager[None]:
        """For networks with attention, whose other kernels have no second derivative."""
        return sdpa_kernel(SDPBackend.MATH) if self._exact else nullcontext()

    def _require_whole(self, nets: Nets) -> None:
        sharded = hasattr(nets[self.net], "unshard")  # FSDP frees weights between passes
        if self._exact and sharded:
            raise ValueError(
                "an exact gradient penalty has no second derivative of a network in parts "
                "(--shard); find it from noise, as GradientPenalty(..., step=0.1) does"
            )

    def _at(
        self,
        nets: Nets,
        teacher: Denoiser,
        beside: State | None,
        t: Tensor,
        cond: Cond,
        labels: tuple[Tensor, ...],
        xt: Tensor,
    ) -> Tensor:
        return self.logits(nets, teacher, xt, t, cond, *labels, beside=beside)

    def turn(self, rollout: Rollout) -> Turn:
        """The update of nets["discriminator"] on samples of a rollout and real data."""
        return Turn(self.net, partial(self._own_loss, rollout))

    def _own_loss(self, rollout: Rollout, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """`judge` of the student's samples; ValueError where the batch has no data."""
        x0 = need_data(self, batch)
        with torch.no_grad():
            pair = self.pair(teacher.path, rollout(nets, batch), x0, batch)
        return self.judge(nets, teacher, batch, pair, batch.cond)

    def fool(
        self,
        nets: Nets,
        teacher: Denoiser,
        batch: Batch,
        n: NoisedSamples,
        cond: Cond,
        features: Tensor | None = None,
        weight: Tensor | None = None,
        bound: float = torch.inf,
        beside: State | None = None,
    ) -> Fooled:
        """The student's adversarial loss, with a gradient through x_t.

        Args:
            nets: the networks.
            teacher: the teacher's denoiser.
            batch: the one whose draws made the noise; its data are used by paired losses.
            n: the student's samples with noise.
            cond: by which condition they are judged.
            features: the fake score's encoder features there, where they are known.
            weight: w of the loss, (B, 1, ..., 1); None: 1.
            bound: logits are clamped to +- this, and have no gradient beyond it.
            beside: the state that the samples were made from, for a joint discriminator.

        Returns: `Fooled`. Raises ValueError where a paired loss has no data.
        """
        if features is None:
            judged = self.logits(nets, teacher, n.xt, n.t, cond, beside=beside)
        else:
            judged = self.pooled(features)
        loss, logit = adversarial.adversarial(self.loss), judged
        if loss.paired:
            with torch.no_grad():
                real = self._beside(teacher.path, need_data(self, batch), n, batch)
                on_real = self.logits(nets, teacher, real, n.t, cond, beside=beside)
            logit = judged - on_real
        each = loss.generator(logit.clamp(-bound, bound))
        weight = each.new_ones(()) if weight is None else weight
        return Fooled(averaged(each, weight, self.average).mean(), each.mean(), judged)

    def _beside(self, path: NoisePath, x0: Tensor, n: NoisedSamples, batch: Batch) -> Tensor:
        """Data at the times of `n`, which `noised` made of this batch, with its noise or other."""
        if self.times is None:
            return x0
        name = "eps" if self.share_noise else "eps/real"
        eps = need_draws(batch).normal(name, x0.shape[1:]).to(x0)
        return perturb(path, x0, eps, n.t)
