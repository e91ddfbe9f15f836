"""Invertible consistency distillation (Starodubcev et al. 2024), https://arxiv.org/abs/2406.14539.

A consistency model forgets the noise that a picture came from, so it cannot edit real pictures.
iCD cuts the trajectory at few times, the edges e_0 < ... < e_K, and learns to jump along it to the
next edge, down for generation and up for encoding. With x_u one step of the teacher's solver from
x_t, down or up the ladder, and s the edge at or beyond u in that direction,

    L_down = E d(X(x_t, t, s; w), X^-(x_u, u, s; w)),    u < t,
    L_up   = E d(X(x_t, t, s; 0), X^-(x_u, u, s; 0)),    u > t,

X^- being the student, or its average, without a gradient, and x_u itself where u = s: consistency
along segments (Wang et al. 2024, https://arxiv.org/abs/2405.18407), in both directions (section
3.1). The upward teacher is not guided, since guided trajectories cannot be retraced. Two
preserving terms tie them to one another at the edges, without guidance: with a < b neighbours and
sg no gradient,

    L_pf = E d(X(sg X(x_b, b, a), a, b), x_b),    L_pr = E d(X(sg X(x_a, a, b), b, a), x_a),

(section 3.2), and L = L_down + L_up + preserve (L_pf + L_pr). At the teacher's exact flow map all
vanish but for the solver's error. The student is told w and generates with it; `invert`
(`fewstep.diffusion.inversion`) encodes pictures without, and an edit is both, with other
conditions, or at another scale, on the way back.

Published are two networks, LoRA adapters of one teacher that has w distilled into it, for the two
directions. Here it is one network, a flow map that is told where it jumps to, so that a direction
costs no weights. Published settings: d = huber of 0.001, preserve 1.5, edges 0, 259, 519, 779 and
999 of 50 DDIM times, w of 0, 7, 11, 15 and 19; upward jumps start at 19, here at t_min. Dynamic
guidance, which is off at high noise, is left out. X^- is the student itself (`decay` 0) or an
average of it, which is steadier on 8x8 digits and slower on a mixture in the plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.constants import constant
from fewstep.diffusion.guidance import Scale
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath, same_shape
from fewstep.diffusion.samplers import Jumps, WithInput
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.flow_maps import (
    Ladder,
    follow,
    noised,
    require_decay,
    solve,
    target_of,
    with_target,
)
from fewstep.distillation.method import (
    Loss,
    Method,
    Nets,
    Product,
    Step,
    Turn,
    need_data,
    need_draws,
)
from fewstep.distillation.named_inputs import model_with, net_with
from fewstep.losses.distance import huber


@dataclass(frozen=True)
class InvertibleConsistency(Method):
    """Consistency along segments, down and up, and the two tied to one another.

    It needs a teacher and data, and conditions where it is guided. The student is a flow map, told
    w too where `scales` is a range. ValueError for another sampler than `Jumps`, and for numbers
    out of range. Starodubcev et al. 2024, https://arxiv.org/abs/2406.14539.
    """

    needs_data: ClassVar[bool] = True

    sampler: Sampler = Jumps(2.5, steps=4, rho=3.0)
    """A `Jumps`, whose times are the edges."""
    ladder: Ladder = Ladder(24)
    """The times of the solver's steps, up to the sampler's first; the edges join them."""
    kappa: float = 1.0
    """The guidance scale that the result is sampled with; within `scales`."""
    scales: tuple[float, float] = (1.0, 1.0)
    """The least and largest guidance scale on the way down, w + 1; equal ones are not told."""
    preserve: float = 1.5
    """Weight of the two terms that tie the directions to one another."""
    c: float = 0.001
    """Size of an element's error at which d turns from a square to a modulus."""
    order: Literal[1, 2] = 1
    """Order of the teacher's solver: 1 is DDIM, 2 Heun's method."""
    decay: float = 0.0
    """Share of itself that the target's average keeps in a step; 0: it is the student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_decay(self, self.decay)
        if not isinstance(self.sampler, Jumps):
            raise ValueError(f"InvertibleConsistency.sampler is a Jumps, got {self.sampler}")
        low, high = self.scales
        if not low <= self.kappa <= high:
            raise ValueError(
                "InvertibleConsistency.scales are the least and the largest kappa, about kappa "
                f"itself; got {self.scales} and {self.kappa:g}"
            )
        if self.preserve < 0 or self.c <= 0:
            raise ValueError(
                "InvertibleConsistency needs preserve >= 0 and c > 0, got "
                f"{self.preserve:g} and {self.c:g}"
            )

    @property
    def told(self) -> bool:
        """Whether the student is told w."""
        return self.scales[0] < self.scales[1]

    def result(self, model: Model) -> Model:
        """`model` with a second time, and w if it is told."""
        model = model_with(model, "s")
        return model_with(model, "w") if self.told else model

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student: a copy of `net` with these inputs, which it does not hear at first; its
        "target" unless decay is 0.
        """
        student = net_with(net, "s")
        return with_target(net_with(student, "w") if self.told else student, self.decay)

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student, on all terms."""
        return (Turn("student", self.student_loss),)

    def after_step(self, step: Step) -> None:
        """The target follows the student."""
        follow(step, self.decay)

    def product(self, nets: Nets, average: nn.Module, teacher: Denoiser | None) -> Product:
        """The average, at the scale `kappa`."""
        sampler = WithInput(self.sampler, "w", self.kappa - 1) if self.told else self.sampler
        return Product(average, sampler)

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """Consistency in both directions, and what they do to one another.

        Args:
            nets: the "student", and the "target" if there is one.
            teacher: the teacher's denoiser.
            batch: x0 (B, *), cond and draws.

        Returns: the mean over the batch; logs the terms, "down", "up", "there_and_back" (L_pf) and
        "back_and_there" (L_pr).

        Raises ValueError where the batch has no data or draws, or guidance meets no conditions.
        """
        x0, draws = need_data(self, batch), need_draws(batch)
        student: Any = nets["student"]
        edges, times = (constant(u, x0) for u in self.edges_and_times(teacher.path))
        low, high = self.scales
        kappa: Scale = low + (high - low) * draws.uniform("kappa").to(x0) if self.told else low
        down = self.consistency(nets, teacher, batch, edges, times, kappa, True)
        up = self.consistency(nets, teacher, batch, edges, times, 1.0, False)
        logs = {"down": down, "up": up}
        if not self.preserve:
            return Loss(down + up, logs)
        k = draws.under("edge").integers("t", len(edges) - 1)
        a, b = edges[k], edges[k + 1]
        xa, xb = (noised(teacher.path, x0, e, draws.under(n)) for e, n in ((a, "a"), (b, "b")))
        logs["there_and_back"] = self.return_trip(student, xb, b, a, batch)
        logs["back_and_there"] = self.return_trip(student, xa, a, b, batch)
        tied = logs["there_and_back"] + logs["back_and_there"]
        return Loss(down + up + self.preserve * tied, logs)

    def edges_and_times(self, path: NoisePath) -> tuple[list[float], list[float]]:
        """The edges, and all times of the solver's steps, both increasing."""
        assert isinstance(self.sampler, Jumps)
        edges = [path.t_min, *reversed(self.sampler.ladder(path))]
        inner = [t for t in self.ladder.times(path, edges[-1]) if t not in edges]
        near = 1e-6 * edges[-1]
        inner = [t for t in inner if min(abs(t - e) for e in edges) > near]
        return edges, sorted({*edges, *inner})

    def consistency(
        self,
        nets: Nets,
        teacher: Denoiser,
        batch: Batch,
        edges: Tensor,
        times: Tensor,
        kappa: Scale,
        down: bool,
    ) -> Tensor:
        """d of the ends of neighbouring points of a trajectory, the mean over the batch: ()."""
        x0, draws = need_data(self, batch), need_draws(batch).under("down" if down else "up")
        i = draws.integers("t", len(times) - 1)
        t, u = (times[i + 1], times[i]) if down else (times[i], times[i + 1])
        s = edge_beyond(edges, u, down)
        xt = noised(teacher.path, x0, t, draws)
        named = self.named(kappa, x0)
        with target_of(nets) as net:
            xu = solve(teacher, xt, t, u, batch.cond, kappa, self.order)
            target = self.jump(net, xu, u, s, batch, named)
        made = self.jump(nets["student"], xt, t, s, batch, named)
        same_shape(prediction=made, x0=target)
        return huber(made - target, self.c).mean()

    def return_trip(self, student: Any, x: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """d of x at t and what comes back from s, whither it goes without a gradient: ()."""
        named = self.named(1.0, x)
        with torch.no_grad():
            there = self.jump(student, x, t, s, batch, named)
        back = self.jump(student, there, s, t, batch, named)
        return huber(back - x, self.c).mean()

    def jump(
        self,
        student: Any,
        xt: Tensor,
        t: Tensor,
        s: Tensor,
        batch: Batch,
        named: dict[str, Tensor],
    ) -> Tensor:
        """X(x_t, t, s) of the student: (B, *)."""
        out: Tensor = student.path.ddim(xt, student(xt, t, batch.cond, s=s, **named), t, s)
        return out

    def named(self, kappa: Scale, like: Tensor) -> dict[str, Tensor]:
        """What the student is told besides: w, if there is a range of it."""
        if not self.told:
            return {}
        return {"w": (kappa if isinstance(kappa, Tensor) else like.new_full((), kappa)) - 1}


def edge_beyond(edges: Tensor, u: Tensor, down: bool) -> Tensor:
    """The edge at or below each u, or at or above: edges (K + 1,) increasing, u (B,) -> (B,)."""
    if down:
        return edges[torch.searchsorted(edges, u, right=True) - 1]
    return edges[torch.searchsorted(edges, u)]
