"""The number of a stage is stored with the networks, and is no weight."""

from __future__ import annotations

import torch

from fewstep.distillation.stages import Stage


def test_it_is_stored_and_never_rounded() -> None:
    stage, other = Stage(), Stage()
    assert not list(stage.parameters())
    stage.bfloat16().number.fill_(257)
    assert stage.number.dtype == torch.int64
    other.load_state_dict(stage.state_dict())
    assert int(other.number) == 257
