"""Whether the fake score keeps up with the student, and so how many updates it gets: ratio "auto".

The student moves at every step, and the fake score f_psi has to follow. How far behind it is shows
in its own loss on the student's samples, if one knew what a score that keeps up would have. That
one is f* = E[x | x_t], and unknown; but the error of a conditional mean is orthogonal to every
function of x_t, and so to g = f_psi - f_phi, the distance from the teacher, which is the direction
that the student is pushed along. With <a, b> = E w a b, of f* the first of these is nought,

    over = <f_psi - x, g>,    gap = <g, g>,    loss = <f_psi - x, f_psi - x>,

or as Pythagoras has it: the teacher's loss there is that of the fake score plus the gap. Otherwise
there is a better score on the line through both, f_psi - (over / gap) g, whose loss is lower by

    avoidable = over^2 / (gap loss)    of the loss.

It is a lower bound of what is to be gained, in units of the loss. It sees a fake score that is too
near the teacher, whose copy it began as, and one that is too far, which the student has overtaken;
the noise in it is about 1 / (N D) for N samples of D numbers. It costs a forward pass of the
teacher beside the fake score's own. Other signals say less: how far the loss falls within a step
is in proportion to the rate, so least where the score is slowest; and a loss below the teacher's,
which the report looks at, is reached long before the fake score is right.

Sums of the three are kept for `WINDOW` steps. Then there is one update more if above `BEHIND` of
the loss was avoidable, and one less if it was below `LEVEL`, between 1 and `MOST`. They are of the
last update before the student's, which is where the student meets the fake score.

That the fake score needs more updates than the student is DMD2's rule of two time scales (Yin et
al. 2024, https://arxiv.org/abs/2405.14867), whose five are the most here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import same_shape

Updates = int | Literal["auto"]
"""Updates of the fake score for one of the student: a number, or by whether it keeps up."""
MOST = 5
"""The most updates of the fake score for one of the student."""
WINDOW = 10
"""Steps that are looked at together."""
BEHIND = 0.01
"""The avoidable share of the loss above which there is an update more."""
LEVEL = 0.0025
"""The avoidable share of the loss below which there is an update less."""


def fewest(ratio: Updates) -> int:
    """The smallest number of updates that `ratio` stands for; ValueError for another text."""
    if isinstance(ratio, int):
        return ratio
    if ratio != "auto":
        raise ValueError(f"ratio is a whole number, or 'auto'; got {ratio!r}")
    return 1


class Pace(nn.Module):
    """How many updates the fake score gets for one of the student: buffers, as a run resumes."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: Tensor
        self.avoidable: Tensor
        self.steps: Tensor
        self.sums: Tensor
        self.register_buffer("updates", torch.ones((), dtype=torch.int64))
        self.register_buffer("avoidable", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(3))

    def reaches(self, count: int) -> bool:
        """Whether there are `count` updates now; always true on the device "meta".

        On an accelerator the host waits for the number, between turns.
        """
        return self.updates.is_meta or int(self.updates) >= count

    @torch.no_grad()
    def follow(self, sums: Tensor) -> None:
        """Take in a step.

        sums: (3,), `shortfall` over its samples. Where f_psi is the teacher exactly the avoidable
        share is 0 / 0 and no reason to change anything.
        """
        self.sums.add_(sums.to(self.sums))
        self.steps.add_(1)
        over, gap, loss = self.sums
        due, share = self.steps >= WINDOW, over**2 / (gap * loss)
        change = (share > BEHIND).long() - (share < LEVEL).long()
        self.updates.add_(due * change).clamp_(1, MOST)
        self.avoidable.copy_(torch.where(due, share.nan_to_num(), self.avoidable))
        self.sums.mul_(~due)
        self.steps.mul_(~due)


@torch.no_grad()
def shortfall(prediction: Tensor, real: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """over, gap and loss, each summed over samples: (3,).

    Args:
        prediction: (B, *), what the fake score says.
        real: (B, *), what the teacher says there.
        target: (B, *), what the fake score learns.
        weight: (B, 1, ..., 1), w of its loss, or (B, *).

    Raises ValueError where the shapes differ.
    """
    same_shape(prediction=prediction, real=real, target=target)
    g, error = (prediction - real).float(), (prediction - target).float()
    sums = [
        (weight * a * b).flatten(1).mean(1).sum() for a, b in ((error, g), (g, g), (error, error))
    ]
    return torch.stack(sums)
