"""Further inputs by name: a second time, a guidance scale, a number of steps.

A flow map is a denoiser g(x_t, t, s) that is told a second time s, so that the step which
believes it, `path.ddim(x_t, g, t, s)`, ends where the teacher's probability flow does. A student
of guided distillation is told the scale w (Meng et al. 2023, https://arxiv.org/abs/2210.03142),
a shortcut model its number of steps (Frans et al. 2024, https://arxiv.org/abs/2410.12557). None
of the networks here has such inputs, and `ExtraInputs` gives them to any of them:

    e' = e + sum_name W2 silu(W1 [cos(f u), sin(f u)]),    W2 = 0 at the start,

with e the network's own time embedding and u the number that the input is told as. So the wrapped
denoiser starts as the one inside, to the bit. Following MeanFlow's best variant (Geng et al. 2025,
https://arxiv.org/abs/2505.13447), s is told as its distance from t: label(t) - label(s), the
difference of the times that the network knows, as a share of its largest value on the path. Any
other input is told as it is. The angular frequencies f are low, from 0.02 to 13 in geometric
steps, since derivatives in the inputs are taken (`fewstep.diffusion.derivative`).

A network says what e is by an attribute `time_embedding`: the module whose output it is, (B, E),
and the width E. The addition is a hook on that module which lasts for one call, so the network
inside stays as it was: its names, its copies, adapters in its layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from keyword import iskeyword
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.encoder_features import require_encoder_features

HIDDEN = 128
"""Width of the hidden layer between an input and the time embedding."""


class TimeEmbedding(NamedTuple):
    """Where a network embeds its time: the module whose output (B, width) that is."""

    module: nn.Module
    width: int


def time_embedding(net: object) -> TimeEmbedding:
    """The time embedding of `net`, from its attribute; ValueError where it says none."""
    said = getattr(net, "time_embedding", None)
    if isinstance(said, tuple) and len(said) == 2 and isinstance(said[0], nn.Module):
        return TimeEmbedding(*said)
    raise ValueError(
        f"{type(net).__name__} does not say where it embeds its time, where further inputs are "
        "added; set its attribute time_embedding to (module, width): the module whose output "
        "(B, width) is the time embedding (fewstep.diffusion.extra_inputs)"
    )


def geometric_frequencies(low: float, high: float, count: int) -> Tensor:
    """Angular frequencies in geometric steps from 2 pi 2^low to 2 pi 2^high: (count,).

    Without values on the device "meta", where a network is built to tell its size: there torch
    does a linspace and a power in Python, for which it imports its compiler.
    """
    if torch.get_default_device().type == "meta":
        return torch.empty(count)
    return 2 * math.pi * 2.0 ** torch.linspace(low, high, count)


class Embedding(nn.Module):
    """One further input: u (B,) -> what is added to the time embedding, (B, width)."""

    trained_in_full = True
    """Not adapted but trained as it is, beside adapters (see `fewstep.nets.lora`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", geometric_frequencies(-8, 1, 32))
        self.first = nn.Linear(64, HIDDEN)
        self.last = nn.Linear(HIDDEN, width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, u: Tensor) -> Tensor:
        """(B,) -> (B, width), zero at the start."""
        phase = u[:, None] * self.frequencies.to(u.dtype)
        waves = torch.cat([phase.cos(), phase.sin()], 1)
        out: Tensor = self.last(nn.functional.silu(self.first(waves.to(self.frequencies.dtype))))
        return out


class ExtraInputs(nn.Module):
    """A denoiser with further inputs by name, each (B,), () or None, which tells it nothing.

    Args:
        net: the denoiser, which is held as `net`, not copied. One that has further inputs already
            keeps them.
        names: of the inputs. "s" is a second time, told as its distance from t; the others are
            numbers, told as they are.
        seed: of the weights of the embeddings' first layers.

    It is called as denoiser(xt, t, cond, s=s, w=w). The new weights are on the network's device,
    in float32 at least. Raises ValueError for names that cannot be used and for a network that
    says no `time_embedding`.
    """

    net: Any
    embeddings: nn.Module
    label_range: float

    def __init__(self, net: nn.Module, names: tuple[str, ...], seed: int = 0) -> None:
        super().__init__()
        known: dict[str, nn.Module] = {}
        if isinstance(net, ExtraInputs):
            known = dict(net.embeddings.named_children())
            net = net.net
        _check(names, known)
        width = time_embedding(net).width
        like = next(net.parameters())
        device = "meta" if like.is_meta else "cpu"
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            new = {name: Embedding(width) for name in names}
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.net = net
        self.label_range = self.net.path.label_range
        if "s" in names and not 0 < abs(self.label_range) < math.inf:
            raise ValueError(
                f"a second time needs times that the network can be told, but label(t) of "
                f"{self.net.path} is not finite from t_min to t_max"
            )
        self.embeddings = nn.Module()  # no ModuleDict, which stands for a list of blocks
        for name, embedding in {**known, **new}.items():
            self.embeddings.add_module(name, embedding.to(dtype))
        if not like.is_meta:
            self.embeddings.to(like.device)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs, in their order."""
        return tuple(name for name, _ in self.embeddings.named_children())

    def forward(
        self, xt: Tensor, t: Tensor, cond: Any = None, *more: Any, **named: Tensor | None
    ) -> Tensor:
        """E[x_0 | x_t], or a flow map's g: xt (B, *), t (B,) or () -> (B, *).

        Args:
            xt, t, cond: as of a denoiser.
            more: what else the denoiser takes by position.
            named: the further inputs, each (B,), () or None.

        Raises TypeError for an unknown name and ValueError for another shape.
        """
        with self._adding(xt, t, named):
            out: Tensor = self.net(xt, t, cond, *more)
        return out

    def several(
        self,
        count: int,
        xt: Tensor,
        t: Tensor,
        cond: Any = None,
        *more: Any,
        **named: Tensor | None,
    ) -> Tensor:
        """The denoiser's predictions by several heads: (count, B, *)."""
        with self._adding(xt, t, named):
            out: Tensor = self.net.several(count, xt, t, cond, *more)
        return out

    def encode(
        self, xt: Tensor, t: Tensor, cond: Any = None, *more: Any, **named: Tensor | None
    ) -> Tensor:
        """The features of the denoiser's encoder: (B, F, *)."""
        with self._adding(xt, t, named):
            return require_encoder_features(self.net).encode(xt, t, cond, *more)

    def forward_with_features(
        self, xt: Tensor, t: Tensor, cond: Any = None, *more: Any, **named: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(forward(...), encode(...)) from one pass."""
        with self._adding(xt, t, named):
            return require_encoder_features(self.net).forward_with_features(xt, t, cond, *more)

    def added(self, xt: Tensor, t: Tensor, named: Mapping[str, Tensor | None]) -> Tensor | None:
        """What the further inputs add to the time embedding: (B, E), or None for nothing.

        xt: (B, *); t: (B,) or (); named: the inputs, each (B,), () or None. TypeError for an
        unknown name.
        """
        parts = []
        for name, value in named.items():
            if name not in self.input_names:
                known = ", ".join(self.input_names)
                raise TypeError(f"this denoiser has no input {name!r}; it has {known}")
            if value is not None:
                embedding = self.embeddings.get_submodule(name)
                parts.append(embedding(self._number(name, value, xt, t)))
        return sum(parts[1:], parts[0]) if parts else None

    @contextmanager
    def _adding(self, xt: Tensor, t: Tensor, named: Mapping[str, Tensor | None]) -> Iterator[None]:
        """Within the block, the time embedding is that of the further inputs too."""
        added, depth, count = self.added(xt, t, named), 0, 0
        if added is None:
            yield
            return
        module, width = time_embedding(self.net)

        def enter(_module: nn.Module, _args: Any) -> None:
            nonlocal depth
            depth += 1

        def add(_module: nn.Module, _args: Any, out: Any) -> Tensor | None:
            nonlocal depth, count
            depth -= 1
            if depth:  # the module calls itself, as one does whose weights are held in bf16
                return None
            if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[1] != width:
                kind = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise ValueError(
                    f"time_embedding says that {type(module).__name__} returns (B, {width}), but "
                    f"it returned {kind}"
                )
            count += 1
            total: Tensor = out + added.to(out.dtype)
            return total

        handles = module.register_forward_pre_hook(enter), module.register_forward_hook(add)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if count == 0:
            raise ValueError(
                f"time_embedding says that {type(module).__name__} embeds the time, but the call "
                "did not run it"
            )

    def _number(self, name: str, value: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """What an input is told as: (B,)."""
        value, count = torch.as_tensor(value, device=xt.device), xt.shape[0]
        if value.ndim > 1 or (value.ndim and value.shape[0] != count):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, expected ({count},) or () for x_t "
                f"{tuple(xt.shape)}"
            )
        dtype = torch.promote_types(t.dtype, torch.float32)
        value, t = (u.to(dtype).expand(count) for u in (value, t))
        if name != "s":
            return value
        path = self.net.path
        passed: Tensor = path.label(t) - path.label(value.clamp(min=path.t_min))
        return passed / self.label_range

    def __getattr__(self, name: str) -> Any:
        """Attributes that the wrapper lacks are the denoiser's, such as its path."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)


def _check(names: tuple[str, ...], known: Mapping[str, Any]) -> None:
    """ValueError unless `names` are new, distinct, and usable as keywords."""
    if isinstance(names, str) or not names:
        raise ValueError(f"ExtraInputs needs the names of inputs, such as ('s',), got {names!r}")
    taken = {"self", "xt", "t", "cond", *dir(nn.Module())}
    for i, name in enumerate(names):
        if not name.isidentifier() or iskeyword(name) or name in taken:
            raise ValueError(f"an input cannot be named {name!r}; use a word such as 's' or 'w'")
        if name in names[:i] or name in known:
            raise ValueError(f"there are two inputs named {name!r}")
