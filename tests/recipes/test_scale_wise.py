"""Scale-wise digits, small: a teacher of both sizes, a student stopped and continued, exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch
from fewstep.export.pt2_onnx import PT2_TOLERANCE, to_pt2
from fewstep.losses.score import denoising
from fewstep.methods.pretrain import Pretrain
from fewstep.nets.mlp import MLP
from fewstep.nets.patch_unet import PatchUNet
from fewstep.recipes import scale_wise
from fewstep.runs.run import Run
from fewstep.storage.model_folder import load_student
from tests.command import bits
from tests.methods.test_runs import finish

SMALL = replace(scale_wise.MODEL, net=PatchUNet(8))


def small(run: Run, steps: int) -> Run:
    return replace(run, model=SMALL, steps=steps, batch=4, save_every=2, sample_every=steps)


@pytest.mark.slow
def test_a_run_from_teacher_to_program(tmp_path: Path) -> None:
    finish(small(scale_wise.scale_wise_teacher(), 2), tmp_path / "teacher", "")
    run = small(scale_wise.scale_wise(), 5)
    for name, stop in (("whole", 0), ("parts", 3), ("parts", 0)):
        finish(run, tmp_path / name, str(tmp_path / "teacher"), stop)
    assert bits(tmp_path / "whole" / "student") == bits(tmp_path / "parts" / "student")
    made = load_student(tmp_path / "whole")
    assert made.sampler == run.method.sampler
    assert made.sample(range(3)).shape == (3, 1, 8, 8)


@pytest.mark.slow
def test_both_calls_in_one_program(tmp_path: Path) -> None:
    finish(small(scale_wise.scale_wise_teacher(), 2), tmp_path / "teacher", "")
    finish(small(scale_wise.scale_wise(), 2), tmp_path / "run", str(tmp_path / "teacher"))
    assert to_pt2(tmp_path / "run", tmp_path / "digits.pt2") < PT2_TOLERANCE


def test_the_teacher_learns_both_sizes_in_turn() -> None:
    """The loss of a step is that of its size, and the network takes both."""
    method, net = scale_wise.scale_wise_teacher().method, SMALL.build()
    draws = Draws.range(0, 4)
    x0 = draws.normal("x0", (1, 8, 8))
    batch = Batch(draws.normal("z", (1, 8, 8)), torch.arange(4), x0, draws)
    nets = method.init(None, net)
    for step, size in enumerate((8, 4, 8)):
        seen: list[torch.Tensor] = []
        hook = nets["denoiser"].register_forward_pre_hook(lambda _, a, s=seen: s.append(a[0]))
        method.turns(step)[0].loss(nets, None, batch)  # type: ignore[arg-type]
        hook.remove()
        assert seen[0].shape == (4, 1, size, size)
    assert denoising(net(x0, torch.ones(4)), x0).shape == (4,)


def test_a_network_of_one_size_says_so() -> None:
    net = replace(SMALL, net=MLP(8, 1)).build()
    message = r"this MLP is for samples of 64 numbers, not of \(1, 4, 4\); .* take PatchUNet"
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(2, 1, 4, 4), torch.ones(2))


def test_scales_of_nothing_are_refused() -> None:
    for scales in ((), (0, 1)):
        with pytest.raises(ValueError, match=r"Pretrain\.scales are 1 or more, at least one"):
            Pretrain(scales=scales)
