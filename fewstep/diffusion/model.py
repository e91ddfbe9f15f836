"""A model as configuration: which network, on which path, predicting what.

A `Model` says everything needed to rebuild a denoiser before its weights are loaded. It is what
run folders and finished students record.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from fewstep.diffusion.denoisers import EDM, Eps, V, Velocity
from fewstep.diffusion.extra_inputs import ExtraInputs
from fewstep.diffusion.heads import Heads
from fewstep.diffusion.noise_path import VE, NoisePath
from fewstep.diffusion.without_values import without_values

TENSORS = 20_000
"""Parameters and buffers of a network; the largest published ones have some thousands."""


def memory() -> int:
    """Bytes of physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Net(ABC):
    """The configuration of a network F(x, label, cond), to be wrapped by a denoiser."""

    @abstractmethod
    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A freshly initialised network for samples of `shape` and labels 0 .. classes.

        Label `classes` stands for none; with classes = 0 the network ignores `cond`.
        """


@dataclass(frozen=True)
class OfTeacher(Net):
    """A placeholder: the network, and all of its `Model`, are taken from the teacher."""

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Always a ValueError: a run replaces this placeholder before it builds a network."""
        raise ValueError("the network of this run is its teacher's; pass the teacher's folder")


@dataclass(frozen=True)
class Model:
    """A denoiser as configuration: `build` makes it, with new weights.

    `net` configures the network, `shape` is that of one sample without the batch, `classes` the
    number of labels (0: unconditional), `path` the noise path, and `predicts` says what the
    network's output is.
    """

    net: Net
    """The network that is built."""
    shape: tuple[int, ...]
    """Shape of one sample, without the batch."""
    classes: int = 0
    """Number of labels; 0: unconditional."""
    path: NoisePath = VE()
    """The noise path, which says what a time t means."""
    predicts: Literal["edm", "eps", "v", "velocity", "denoiser"] = "edm"
    """What the network's output is; "denoiser": the network is a whole one, with its own path."""
    sigma_data: float = 0.5
    """Standard deviation of the data, for "edm"."""
    inputs: tuple[str, ...] = ()
    """Further inputs by name, such as "s" of a flow map (`fewstep.diffusion.extra_inputs`)."""
    heads: int = 1
    """Predictions of one call, of a network with several (`fewstep.diffusion.heads`)."""

    def __post_init__(self) -> None:
        if min(self.shape, default=1) < 1 or self.classes < 0 or self.heads < 1:
            raise ValueError(
                "Model needs a shape of positive numbers, classes >= 0 and heads >= 1, got "
                f"{self.shape}, {self.classes} and {self.heads}"
            )

    def build(self, seed: int = 0) -> nn.Module:
        """The denoiser, with weights initialised from `seed`.

        Args:
            seed: of torch's CPU generator while the network is built; its global state is
                restored.

        Returns: an `nn.Module` and `Denoiser` on the CPU, or on torch's default device.

        Raises ValueError for a network that this machine's memory cannot hold, for an unknown
        `predicts`, where `predicts` and `path` contradict a network that is a whole denoiser, and
        for `inputs` that it cannot have.
        """
        denoiser = self._denoiser(seed)
        if self.inputs:
            denoiser = ExtraInputs(denoiser, self.inputs, seed)
        return denoiser if self.heads == 1 else Heads(denoiser, self.heads)

    def carried(self, weights: Mapping[str, torch.Tensor], to: Model) -> dict[str, torch.Tensor]:
        """A state dict of this model by the names of `to`, which is this one with more to it.

        The tensors of further inputs and heads are not among them.
        """
        wrappers = (to.inputs and not self.inputs, to.heads > 1 and self.heads == 1)
        prefix = "net." * sum(map(bool, wrappers))
        return {prefix + name: tensor for name, tensor in weights.items()}

    def _denoiser(self, seed: int) -> nn.Module:
        """The denoiser without further inputs."""
        with torch.random.fork_rng(devices=[]):
            self._refuse_too_large()
            torch.manual_seed(seed)
            net = self.net.build(self.shape, self.classes)
        net_path = getattr(net, "path", None)
        if isinstance(net_path, NoisePath) or self.predicts == "denoiser":
            return self._whole(net, net_path)
        if self.predicts == "edm":
            return EDM(net, self.path, self.sigma_data)
        wrappers: dict[str, Callable[[nn.Module, NoisePath], nn.Module]]
        wrappers = {"eps": Eps, "v": V, "velocity": Velocity}
        if self.predicts not in wrappers:
            names = ", ".join(["edm", *wrappers, "denoiser"])
            raise ValueError(f"Model.predicts is one of {names}, got {self.predicts!r}")
        return wrappers[self.predicts](net, self.path)

    def _refuse_too_large(self) -> None:
        """A ValueError for a network that this machine cannot hold, found without memory for it.

        It is built of tensors without values, and no further than to the first too many.
        """
        if torch.get_default_device().type == "meta":
            return
        most, count, size = memory(), 0, 0

        def meet(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
            nonlocal count, size
            count, size = count + 1, size + (0 if tensor is None else tensor.nbytes)
            if count > TENSORS or size > most:
                has = f"{TENSORS:,} tensors" if count > TENSORS else f"{most >> 30:,} GiB"
                raise ValueError(
                    f"the network has more than {has}, more than "
                    f"{'any' if count > TENSORS else 'this machine can hold'}; make it smaller: "
                    f"{str(self)[:200]}"
                )

        hooks = (
            register_module_parameter_registration_hook(meet),
            register_module_buffer_registration_hook(meet),
        )
        try:
            with without_values():
                self.net.build(self.shape, self.classes)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            if "verflow" in str(error):
                raise ValueError(f"no tensor has as many numbers: {str(self)[:200]}") from None
        finally:  # other errors of a build without values: the real build runs, or raises them
            for hook in hooks:
                hook.remove()

    def _whole(self, net: nn.Module, net_path: object) -> nn.Module:
        """`net`, which is a denoiser already; ValueError unless `predicts` and `path` fit it."""
        kind = type(self.net).__name__
        if not isinstance(net_path, NoisePath):
            raise ValueError(f"{kind} is no whole denoiser; Model.predicts says what it predicts")
        if self.predicts != "denoiser" or net_path != self.path:
            raise ValueError(
                f"{kind} is a whole denoiser: it needs Model.predicts 'denoiser' and Model.path "
                f"{net_path}, got {self.predicts!r} and {self.path}"
            )
        return net
