"""The encoder tap: a network whose encoder can be heard.

SiDA (Zhou et al. 2024, https://arxiv.org/abs/2410.14919) and DMD2 (Yin et al. 2024,
https://arxiv.org/abs/2405.14867) let the fake score double as the discriminator: its encoder has
already computed features of x_t, and a head (in SiDA's case the mean over channels, in DMD2's a
learned one, `fewstep.distillation.discriminator_head`) turns them into logits of real against
fake. A `Tapped` network hands these features out, either alone, for the price of the encoder, or
together with its answer from one pass. In a U-Net they are the output of the last encoder block,
at the lowest resolution, before the decoder's first blocks; in a stack of equal blocks, the state
half way through.

The two methods take the arguments that the network itself takes: (xt, t, cond) for a denoiser,
(x, label, cond) for the network inside one.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class HasEncoderFeatures(Protocol):
    """A network with an encoder tap.

    The calls agree exactly: encode(...) is the second result of forward_with_features(...), and
    calling the network gives the first.
    """

    def __call__(self, *args: Any) -> Tensor: ...

    def encode(self, *args: Any) -> Tensor:
        """The features (B, F, *), channels first; the decoder is not run."""
        ...

    def forward_with_features(self, *args: Any) -> tuple[Tensor, Tensor]:
        """(the answer, features) from one pass."""
        ...


def require_encoder_features(net: object) -> HasEncoderFeatures:
    """`net` itself, if it has an encoder tap."""
    if not isinstance(net, HasEncoderFeatures):
        raise ValueError(
            f"the discriminator is the encoder of the fake score, but {type(net).__name__} has no "
            "encoder tap; give it the methods encode and forward_with_features "
            "(fewstep.diffusion.encoder_features)"
        )
    return net


def feature_shape(net: object) -> tuple[int, ...]:
    """Shape of the features of one sample, as `net.feature_shape` says: what a head is built on.

    (F, h, w), or (F,) where they are tokens, in whatever number, or a vector.
    """
    shape = getattr(require_encoder_features(net), "feature_shape", None)
    if shape is None:
        raise ValueError(
            f"a learned head needs the shape of the features, which {type(net).__name__} does not "
            "tell; give it a tuple feature_shape (fewstep.diffusion.encoder_features), "
            "or say pool='channels'"
        )
    return tuple(shape)
