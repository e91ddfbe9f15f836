"""The encoder tap: a denoiser whose encoder can be heard.

SiDA (Zhou et al. 2024, https://arxiv.org/abs/2410.14919) and DMD2 (Yin et al. 2024,
https://arxiv.org/abs/2405.14867) let the fake score double as the discriminator: its encoder has
already computed features of x_t, and a head (in SiDA's case the mean over channels) turns them
into logits of real against fake. A `Tapped` denoiser hands these features out, either alone, for
the price of the encoder, or together with the prediction from one pass. Features are the output
of the last encoder block, at the lowest resolution, before the decoder's first blocks.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from fewstep.core import Cond
from fewstep.path import NoisePath


@runtime_checkable
class Tapped(Protocol):
    """A `Denoiser` with an encoder tap; the arguments of all three calls are the same.

    xt: (B, C, H, W), t: (B,) or (), cond as for any denoiser, augment_labels: (B, A) or None
    where the network knows how its input was augmented. The three agree exactly: encode(...) is
    the second result of forward_with_features(...), and calling the denoiser gives the first.
    """

    path: NoisePath

    def __call__(
        self, xt: Tensor, t: Tensor, cond: Cond = None, augment_labels: Tensor | None = None
    ) -> Tensor: ...

    def encode(
        self, xt: Tensor, t: Tensor, cond: Cond = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """The features (B, F, h, w); the decoder is not run."""
        ...

    def forward_with_features(
        self, xt: Tensor, t: Tensor, cond: Cond = None, augment_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(E[x_0 | x_t], features) from one pass."""
        ...
