"""Encoder features: networks whose encoder can be read by a discriminator.

SiDA (Zhou et al. 2024, https://arxiv.org/abs/2410.14919) and DMD2 (Yin et al. 2024,
https://arxiv.org/abs/2405.14867) let the fake score double as the discriminator: its encoder has
already computed features of x_t, and a head (in SiDA's case the mean over channels, in DMD2's a
learned one, `fewstep.distillation.discriminator_head`) turns them into logits of real against
fake. A network with encoder features (`HasEncoderFeatures`) returns them either alone, at the
cost of the encoder, or together with its output from one pass. In a U-Net they are the output of
the last encoder block, at the lowest resolution, before the decoder's first blocks; in a stack of
equal blocks, the state half way through.

A discriminator may also read the outputs of several blocks of one network (`layer_features`).

The two methods take the arguments that the network itself takes: (xt, t, cond) for a denoiser,
(x, label, cond) for the network inside one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from fewstep.config import nearest


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
            f"a discriminator reads an encoder, but {type(net).__name__} has no "
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


class _Heard(Exception):
    """All layers that were asked for have been computed."""


def layer_features(net: Any, layers: Sequence[str], *args: Any) -> list[Tensor]:
    """The outputs of the modules `layers` of a network, in their order; later ones are not run.

    Args:
        net: a denoiser that is a module.
        layers: names of its modules, such as "net.blocks.3". Each returns one tensor: (B, F),
            channels first (B, F, h, w), or tokens (B, N, F).
        args: what the denoiser is called with.

    Returns: a tensor (B, F, *) for each, channels first. Raises ValueError for a name that the
    network does not have, and for a module that is not called or returns something else.
    """
    known = dict(net.named_modules()) if isinstance(net, nn.Module) else {}
    heard: dict[str, Tensor] = {}

    def hear(name: str, _module: nn.Module, _args: Any, out: Any) -> None:
        if not isinstance(out, Tensor):
            raise ValueError(f"the layer {name!r} returns {type(out).__name__}, not one tensor")
        heard[name] = out.mT if out.ndim == 3 else out
        if len(heard) == len(layers) and not in_parts:
            raise _Heard

    def instead(_module: nn.Module, _args: Any, _out: Any) -> tuple[Tensor, ...]:
        return tuple(heard.values())

    in_parts = hasattr(net, "unshard")
    with ExitStack() as hooks, suppress(_Heard):
        if in_parts:  # FSDP ends its passes, and gathers weights for the gradients of its output
            hooks.callback(net.register_forward_hook(instead, prepend=True).remove)
        for name in layers:
            if name not in known:
                raise ValueError(
                    f"{type(net).__name__} has no layer {name!r}{nearest(name, known)}"
                )
            handle = known[name].register_forward_hook(partial(hear, name))
            hooks.callback(handle.remove)
        net(*args)
    if missing := [name for name in layers if name not in heard]:
        raise ValueError(f"{type(net).__name__} does not call its layer {missing[0]!r}")
    return [heard[name] for name in layers]
