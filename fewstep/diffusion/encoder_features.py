"""Encoder features: networks whose encoder can be read by a discriminator.

SiDA (Zhou et al. 2024, https://arxiv.org/abs/2410.14919) and DMD2 (Yin et al. 2024,
https://arxiv.org/abs/2405.14867) let the fake score double as the discriminator: its encoder has
already computed features of x_t, and a head (in SiDA's case the mean over channels, in DMD2's a
learned one, `fewstep.distillation.discriminator_head`) turns them into logits of real against
fake. A network with encoder features (`HasEncoderFeatures`) returns them either alone, at the
cost of the encoder, or together with its output from one pass. In a U-Net they are the output of
the last encoder block, at the lowest resolution, before the decoder's first blocks; in a stack of
equal blocks, the state half way through.

The two methods take the arguments that the network itself takes: (xt, t, cond) for a denoiser,
(x, label, cond) for the network inside one.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class HasEncoderFeatures(Protocol):
    """A network that returns the features of its encoder.

    The calls agree exactly: encode(...) is the second result of forward_with_features(...), and
    calling the network gives the first.
    """

    def __call__(self, *args: Any) -> Tensor: ...

    def encode(self, *args: Any) -> Tensor:
        """The features (B, F, *), channels first; the decoder is not run."""
        ...

    def forward_with_features(self, *args: Any) -> tuple[Tensor, Tensor]:
        """(the network's output, features) from one pass."""
        ...


def require_encoder_features(net: object) -> HasEncoderFeatures:
    """`net` itself; ValueError if it does not return encoder features."""
    if not isinstance(net, HasEncoderFeatures):
        raise ValueError(
            f"the discriminator is the encoder of the fake score, but {type(net).__name__} has no "
            "encoder features; give it the methods encode and forward_with_features "
            "(fewstep.diffusion.encoder_features)"
        )
    return net


def feature_shape(net: object) -> tuple[int, ...]:
    """Shape of the features of one sample, from the attribute `net.feature_shape`.

    (F, h, w), or (F,) where features are tokens, in whatever number, or a vector. A learned head
    is built for this shape. ValueError where the network has no encoder features or no such
    attribute.
    """
    shape = getattr(require_encoder_features(net), "feature_shape", None)
    if shape is None:
        raise ValueError(
            f"a learned head needs the shape of the features, which {type(net).__name__} does not "
            "tell; give it a tuple feature_shape (fewstep.diffusion.encoder_features), "
            "or say pool='channels'"
        )
    return tuple(shape)
