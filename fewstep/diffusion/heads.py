"""Several predictions of x_0 by one call: a network with its output layer repeated.

Some students say more than one thing at once: the x_0-predictions of the next L intervals of time
(PDD), or the parameters of a policy that is followed without further calls (pi-Flow). Their
networks are the teacher's with several output layers on one trunk h,

    F_k = W_k h(x_t, t),    g_k = the prediction of x_0 that F_k stands for,    k = 0 .. count - 1,

each of which starts as the teacher's own, so that all answers are the teacher's at first. `Heads`
makes such a network of any denoiser that says where its output layer is, by an attribute
`output_layer`: the module whose result, whatever a batch's size, is turned sample by sample into
F. During a call its result is replaced, by a hook, and what follows it sees a batch of `count`
times as many samples; so the network inside stays as it was.

Since F is affine in W, a mixture sum_k c_k g_k whose c sum to 1 is the prediction of one layer
sum_k c_k W_k: what such a call costs is that of the heads that are mixed, not of further trunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


def output_layer(net: object) -> nn.Module:
    """The output layer of `net`, from its attribute; ValueError where it says none."""
    said = getattr(net, "output_layer", None)
    if isinstance(said, nn.Module):
        return said
    raise ValueError(
        f"{type(net).__name__} does not say where its output layer is, of which heads are copies; "
        "set its attribute output_layer to that module (fewstep.diffusion.heads)"
    )


def require_heads(net: object, count: int, reader: object) -> None:
    """ValueError unless `net` has `count` heads, as the sampler or policy `reader` needs."""
    found = getattr(net, "head_count", 0)
    if found not in (count, None):  # None: any number, where nothing is computed
        raise ValueError(
            f"{reader} is for a network with {count} heads, and {type(net).__name__} has "
            f"{found or 'none'}; sample it as it was trained"
        )


class HeadList(nn.ModuleList):
    """The output layers."""

    trained_in_full = True
    """Not adapted but trained as they are, beside adapters (see `fewstep.nets.lora`)."""


class Heads(nn.Module):
    """A denoiser with several output layers in place of its own.

    Args:
        net: the denoiser, which is held as `net`, not copied; of one with heads, what is inside.
        count: the number of heads, 1 or more.

    As a denoiser it answers with its first head, or with the mixture that it is asked for. Raises
    ValueError for a network that says no `output_layer`.
    """

    net: Any

    def __init__(self, net: nn.Module, count: int) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"a network has 1 head or more, got {count}")
        self.net = net.net if isinstance(net, Heads) else net
        layer = output_layer(self.net)
        self.layers = HeadList(deepcopy(layer) for _ in range(count))

    @property
    def head_count(self) -> int:
        """The number of heads."""
        return len(self.layers)

    def forward(
        self,
        xt: Tensor,
        t: Tensor,
        cond: Any = None,
        *more: Any,
        mix: Sequence[float] = (1.0,),
        **named: Any,
    ) -> Tensor:
        """sum_k mix_k g_k: xt (B, *), t (B,) or () -> (B, *).

        Args:
            xt, t, cond: as of a denoiser.
            more, named: what else the denoiser takes.
            mix: a number for each of the first heads, which sum to 1; the others have none.
        """

        def mixed(*args: Any) -> Tensor:
            parts = [c * layer(*args) for c, layer in zip(mix, self.layers, strict=False) if c]
            return torch.stack(parts).sum(0)

        with self._answering(mixed):
            out: Tensor = self.net(xt, t, cond, *more, **named)
        return out

    def answers(self, xt: Tensor, t: Tensor, cond: Any = None, *more: Any, **named: Any) -> Tensor:
        """g_k of all heads, from one pass: (count, B, *); arguments as of a denoiser."""

        def every(*args: Any) -> Tensor:
            return torch.cat([layer(*args) for layer in self.layers])

        with self._answering(every):
            out: Tensor = self.net.several(len(self.layers), xt, t, cond, *more, **named)
        return out

    @contextmanager
    def _answering(self, answer: Callable[..., Tensor]) -> Iterator[None]:
        """Within the block, the output layer's result is `answer` of its arguments."""

        def replace(_module: nn.Module, args: tuple[Any, ...], _out: Any) -> Tensor:
            return answer(*args)

        handle = output_layer(self.net).register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    def __getattr__(self, name: str) -> Any:
        """Attributes that the wrapper lacks are the denoiser's, such as its path."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)
