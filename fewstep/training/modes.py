"""Which net is trained: its parameters ask for gradients and its modules are in training mode.

A turn switches one net on and off again. torch's own switches walk through all modules each time
and make a name of each; here the modules of every net are listed once a step, in which they do not
change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fewstep.distillation.method import Nets


class Switch:
    """The parameters of a net and the mode of its modules, as they are listed when it is made."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.parameters, self.modules = net, [*net.parameters()], [*net.modules()]
        self.own = any(type(module).train is not nn.Module.train for module in self.modules)
        """Whether a module has its own way of changing its mode."""

    def set(self, trained: bool) -> None:
        """Train the net from now on, or freeze it and put it in evaluation mode."""
        for p in self.parameters:
            p.requires_grad_(trained)
        if self.own:
            self.net.train(trained)
            return
        for module in self.modules:
            module.training = trained


class Switches:
    """Those of all nets, of which one or none is trained."""

    def __init__(self, nets: Nets) -> None:
        self.nets = {name: Switch(net) for name, net in nets.items()}
        for switch in self.nets.values():
            switch.set(False)

    @contextmanager
    def training(self, name: str, *beside: str) -> Iterator[nn.Module]:
        """Within the block net `name`, with those `beside`, is trainable and in training mode."""
        switches = [self.nets[each] for each in (name, *beside)]
        for switch in switches:
            switch.set(True)
        try:
            yield self.nets[name].net
        finally:
            for switch in switches:
                switch.set(False)


@contextmanager
def training_only(nets: Nets, name: str) -> Iterator[nn.Module]:
    """Within the block `nets[name]` alone is trainable and in training mode."""
    with Switches(nets).training(name) as net:
        yield net
