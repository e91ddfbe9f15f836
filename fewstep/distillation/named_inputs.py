"""Students that are told more than the teacher: their description and their network.

Both say the same names (`fewstep.diffusion.extra_inputs`), each once.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from torch import nn

from fewstep.diffusion.extra_inputs import ExtraInputs
from fewstep.diffusion.model import Model


def model_with(model: Model, name: str) -> Model:
    """`model` with the input `name`, if it has not got it."""
    known = model.inputs
    return model if name in known else replace(model, inputs=(*known, name))


def net_with(net: nn.Module, name: str) -> nn.Module:
    """A copy of the denoiser `net` with the input `name`, which it does not hear at first."""
    student = deepcopy(net)
    known = getattr(net, "input_names", ())
    return student if name in known else ExtraInputs(student, (name,))
