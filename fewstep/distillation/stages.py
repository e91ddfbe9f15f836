"""Stages: methods whose student becomes the teacher of the next, with fewer steps.

The number of a stage follows from the step where training is; what a run ships has the steps of
the stage that it was last trained in, which is remembered with its networks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Stage(nn.Module):
    """The number of the stage of the last step: a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Tensor
        self.register_buffer("number", torch.zeros((), dtype=torch.int64))
