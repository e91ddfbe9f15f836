"""Low-rank adapters: student, fake score and teacher on one set of weights.

Hu et al. 2021 (LoRA), https://arxiv.org/abs/2106.09685. A layer y = W x + b of the teacher is, in
every other role,

    y = W x + b + (alpha / r) B A x,    A: (r, in) normal,  B: (out, r) zero at the start,

(equation 3), of which A and B alone are trained; a convolution W has a convolution A and a 1x1 B.
A role starts as the teacher, to the bit.

`LoRA.adapt` makes a role: a module of the teacher's structure whose frozen weights are the
teacher's own tensors, held as buffers that are not stored. So `parameters()` and `state_dict()`
are the adapters alone, `requires_grad_` reaches nothing else, and a copy of a role shares what it
does not train. Optimisers, averages, checkpoints and the loop need to know nothing of adapters.
A module with the attribute `trained_in_full`, such as the embedding of a further input
(`fewstep.diffusion.extra_inputs`), is copied, and trained beside the adapters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.config import nearest
from fewstep.nets.edm_layers import Conv2d

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2d)
"""What can be adapted: a product with a weight (out, in, ...), and a bias."""
PRODUCTS: Mapping[int, Callable[[Tensor, Tensor], Tensor]] = {
    2: F.linear,
    3: F.conv1d,
    4: F.conv2d,
    5: F.conv3d,
}
"""The product with a weight of so many dimensions."""
ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("qkv", "enc.*.proj", "dec.*.proj"),
)
"""The projections of attention, by their names in diffusers and in `fewstep.nets`."""


@dataclass(frozen=True)
class LoRA:
    """Train low-rank adapters beside the frozen teacher, in place of whole networks.

    `rank` is r, `alpha` sets the factor alpha / r of the adapters, `targets` says which layers get
    them. ValueError for a rank below 1 or an alpha that is not positive and finite. Hu et al.
    2021, https://arxiv.org/abs/2106.09685.
    """

    rank: int = 64
    """Rank r of the adapters, 1 or more."""
    alpha: float | None = None
    """Adapters are multiplied by alpha / rank; None: by 1."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the layers, "*" for any part; by default those of `ATTENTION`."""
    teacher: str = ""
    """Digest of the teacher's weights, recorded by the run; other weights are refused."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA.rank is 1 or more, got {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"LoRA.alpha is positive and finite, got {self.alpha:g}")

    @property
    def scale(self) -> float:
        """The factor alpha / r of the adapters, 1 where alpha is None."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def adapt(self, net: nn.Module, seed: int = 0) -> nn.Module:
        """A network that answers as `net` does, and trains adapters on its weights.

        Args:
            net: the teacher, on its device; its tensors are shared, not copied.
            seed: of the initial A.

        Returns: a module of the structure of `net` whose parameters and state dict are the
        adapters alone.

        Raises ValueError where a target is no layer, nothing can be adapted, or a layer rewrites
        its weight. Hu et al. 2021, https://arxiv.org/abs/2106.09685.
        """
        for module in net.modules():
            if getattr(module, "rewrites_weight", False):
                raise ValueError(
                    f"{type(module).__name__} normalises its weight in each call, so that "
                    "nothing can be added to it; train this network without LoRA"
                )
        own = {id(t) for module in _in_full(net) for t in _tensors(module)}
        shared = {id(t): t for t in _tensors(net) if id(t) not in own}
        role = deepcopy(net, dict[int, Any](shared))
        names = self.layers(role)
        _share(role)
        generator = torch.Generator().manual_seed(seed)
        for name in names:
            parent, _, child = name.rpartition(".")
            home = role.get_submodule(parent)
            layer = Adapted(getattr(home, child), self.rank, self.scale, generator)
            setattr(home, child, layer)
        return role

    def layers(self, net: nn.Module) -> list[str]:
        """The names of the layers of `net` that are adapted, in its order.

        ValueError where a target matches none, or there is nothing to adapt.
        """
        full = {id(module) for module in _in_full(net)}
        every = [
            name
            for name, module in net.named_modules()
            if _adaptable(module) and id(module) not in full
        ]
        hits = {
            target: {name for name in every if fnmatchcase(f".{name}", f"*.{target}")}
            for target in self.targets or ATTENTION
        }
        known = sorted({_short(name) for name in every})
        for target in self.targets:
            if not hits[target]:
                hint = nearest(target, known)
                raise ValueError(f"LoRA: no layer of this network is named {target!r}{hint}")
        names = set().union(*hits.values())
        if not names:
            raise ValueError(
                "LoRA adapts the projections of attention, and this network has none; say which "
                f"layers with targets=(...); it has {', '.join(known)}"
            )
        return [name for name in every if name in names]

    def merged(
        self, weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state dict of one network W + (alpha / r) B A that answers as a role does.

        weights: the teacher's state dict, whose devices the result has, adapters: the role's; what
        of them belongs to no pair A and B was trained in full.
        """
        whole, full = dict(weights), dict(adapters)
        for layer, (down, up) in pairs(adapters).items():
            del full[f"{layer}.up"], full[f"{layer}.down.weight"]
            weight = whole[f"{layer}.weight"]
            change = self.scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            whole[f"{layer}.weight"] = weight + change.to(weight)
        return whole | {name: t.to(whole.get(name, t)) for name, t in full.items()}


def pairs(adapters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters by layer: name -> (A, B), from a role's state dict."""
    return {
        name.removesuffix(".up"): (adapters[f"{name.removesuffix('up')}down.weight"], up)
        for name, up in adapters.items()
        if name.endswith(".up")
    }


class Adapted(nn.Module):
    """A frozen layer with trainable adapters A and B."""

    def __init__(
        self, base: nn.Module, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        weight: Any = base.weight
        like = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        start = torch.randn(rank, *weight.shape[1:], generator=generator)
        down: Any = deepcopy(base)  # the same operation, strides and all, of r outputs
        del down.weight
        down.weight = nn.Parameter((start / math.sqrt(start[0].numel())).to(**like))
        down.bias = None
        self.base, self.down, self.scale = base, down, scale
        ones = (1,) * (weight.ndim - 2)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, *ones, **like))

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + (alpha / r) B A x, for an input x of the layer."""
        low = self.down(x)
        up = self.up.to(low.dtype)
        change = PRODUCTS[up.ndim](low, up)
        return torch.add(self.base(x), change, alpha=self.scale)

    def __getattr__(self, name: str) -> Any:
        """Attributes that the wrapper lacks are the layer's, such as in_features."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class Shared(Tensor):
    """A tensor that its copies share; operations on it know plain tensors only."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


def _share(net: nn.Module) -> None:
    """Turn parameters and buffers into buffers that are shared, frozen and not stored."""
    full = {id(module) for module in _in_full(net)}
    for module in net.modules():
        if id(module) in full:
            continue
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                module._parameters.pop(name, None)
                shared = tensor.detach().as_subclass(Shared)
                module.register_buffer(name, shared, persistent=False)


def as_plain(net: nn.Module) -> None:
    """Turn the shared tensors of a role into plain ones in the same memory, in place.

    For what cannot read `Shared`, such as a compiler. Copies made later share them as before.
    """
    for module in net.modules():
        for name, tensor in module._buffers.items():
            if isinstance(tensor, Shared):
                plain: Any = tensor.as_subclass(Tensor)
                plain.__deepcopy__ = tensor.__deepcopy__
                module._buffers[name] = plain


def _in_full(net: nn.Module) -> Iterator[nn.Module]:
    """The modules of `net` that are trained in full, with all that they are made of."""
    for module in net.modules():
        if getattr(module, "trained_in_full", False):
            yield from module.modules()


def _tensors(net: nn.Module) -> Iterator[Tensor]:
    return chain(net.parameters(), net.buffers())


def _adaptable(module: nn.Module) -> bool:
    whole = getattr(module, "groups", 1) == 1
    return isinstance(module, LAYERS) and module.weight is not None and whole


def _short(name: str) -> str:
    """The end of a name that says something: "to_out.0" of "mid_block.attn1.to_out.0"."""
    match = re.search(r"[^.]+(\.\d+)*$", name)
    return match[0] if match else name


def recorded(lora: LoRA, digest: str) -> LoRA:
    """`lora` with the teacher's digest; ValueError where it names another one."""
    if lora.teacher not in ("", digest):
        raise ValueError(
            f"the adapters belong to a teacher with the digest {lora.teacher[:12]}..., and this "
            f"one has {digest[:12]}...; pass the teacher that they were trained on"
        )
    return replace(lora, teacher=digest)
