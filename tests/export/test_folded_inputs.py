"""Numbers that a student is told become a bias: the same predictions, in stock diffusers too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.diffusion.extra_inputs import ExtraInputs
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, Flow, NoisePath
from fewstep.diffusion.samplers import FewStep, Jumps, WithInput
from fewstep.diffusion.types import Sampler
from fewstep.export.folded_inputs import plain, without_inputs
from fewstep.nets.mlp import MLP
from fewstep.storage.model_folder import load_student, save_model
from tests.conftest import Folders
from tests.networks import stirred


def flow_map(
    sampler: Sampler, path: NoisePath = VE(), names: tuple[str, ...] = ("s",)
) -> Generator:
    """A small network whose embeddings of its inputs are not zero."""
    model = Model(MLP(16, 1), (2,), path=path, inputs=names)
    net = stirred(model.build())
    return Generator(net, sampler, (2,), model=model)


@torch.no_grad()
def apart(a: Generator, b: Generator) -> float:
    z = torch.randn(5, 2)
    x, y = (g.sampler(g.denoiser, z) for g in (a, b))
    return float((x - y).abs().max() / x.abs().max())


@pytest.mark.parametrize("path", [VE(), Flow()], ids=repr)
def test_one_jump_is_one_call_of_a_plain_network(path: NoisePath) -> None:
    student = flow_map(Jumps(0.9), path)
    made = plain(student, Path("run"))
    assert made.sampler == FewStep(0.9, 1, "ddim")
    assert made.model is not None
    assert made.model.inputs == ()
    assert not isinstance(made.denoiser, ExtraInputs)
    assert apart(student, made) < 1e-6
    told_nothing = Generator(student.denoiser.net, made.sampler, (2,))
    assert apart(student, told_nothing) > 1e-3


def test_a_number_is_the_same_in_every_call() -> None:
    names, few = ("w", "s"), FewStep(2.5, 3, "ddim")
    student = flow_map(WithInput(few, "w", 3.5), names=names)
    made = plain(student, Path("run"))
    assert made.sampler == few
    assert apart(student, made) < 1e-6
    both = flow_map(WithInput(Jumps(2.5), "w", 3.5), names=names)
    assert apart(both, plain(both, Path("run"))) < 1e-6
    other = flow_map(WithInput(few, "w", 1.0), names=names)
    assert apart(other, made) > 1e-3


def test_weights_are_shared_but_one_bias() -> None:
    student = flow_map(Jumps(2.5))
    before = {name: t.clone() for name, t in student.denoiser.state_dict().items()}
    made = plain(student, Path("run"))
    theirs = {p.data_ptr() for p in student.denoiser.parameters()}
    new = [name for name, p in made.denoiser.named_parameters() if p.data_ptr() not in theirs]
    assert len(new) == 1
    assert new[0].endswith("bias")
    assert all(torch.equal(t, before[name]) for name, t in student.denoiser.state_dict().items())


def test_what_changes_between_calls_is_refused() -> None:
    message = (
        r"run has further inputs \(s\), which differ between its 2 calls, .* do not take; else"
    )
    with pytest.raises(ValueError, match=message):
        plain(flow_map(Jumps(2.5, 2, 2.0)), Path("run"), "; else")
    assert without_inputs(Jumps(2.0, 2), VE()) == (
        FewStep(2.0, 2, "ddim"),
        [(2.0, {"s": 1.0}), (1.0, {"s": 0.0})],
    )


def test_a_plain_student_is_itself() -> None:
    model = Model(MLP(16, 1), (2,))
    student = Generator(model.build(), FewStep(2.5), (2,), model=model)
    assert plain(student, Path("run")) is student


def stirred_student(folder: Path, home: Path, sampler: Sampler, names: tuple[str, ...]) -> Path:
    """A student of the pipeline in `folder`, told these inputs by embeddings that are not zero."""
    from dataclasses import replace

    from fewstep.teachers.diffusers.load import load_pipeline

    teacher = load_pipeline(folder)
    assert teacher.model is not None
    role = ExtraInputs(teacher.denoiser, names)
    for p in role.embeddings.parameters():
        p.data += 0.3 * torch.randn_like(p)
    card = {"teacher": dict(teacher.card)}
    save_model(home, role.state_dict(), replace(teacher.model, inputs=names), sampler, card)
    return home


CASES: list[tuple[str, Sampler, str]] = [
    *((kind, Jumps(625.0), "EulerDiscreteScheduler") for kind in ("sd", "sd_v", "sdxl")),
    *(
        (kind, Jumps(1.0), "FlowMatchEulerDiscreteScheduler")
        for kind in ("sd3", "sana", "flux", "qwen_image", "z_image")
    ),
    ("pixart", Jumps(625.0), "FewstepSolver"),
    ("sd", Jumps(999.0, 3), "FewstepSolver"),
    ("sd", WithInput(FewStep(999.0, 4, unit=True), "w", 3.5), "LCMScheduler"),
    ("sd_v", WithInput(FewStep(999.0, 4, "ddim", unit=True), "w", 3.5), "DDIMScheduler"),
    ("sd3", WithInput(FewStep(1.0, 4), "w", 3.5), "FlowMatchEulerDiscreteScheduler"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sampler", "scheduler"), CASES, ids=str)
def test_stock_diffusers_samples_a_student_that_was_told_numbers(
    folders: Folders, tmp_path: Path, kind: str, sampler: Sampler, scheduler: str
) -> None:
    """Beside the student as it is, inputs and all; the control is told nothing."""
    pytest.importorskip("diffusers")
    from fewstep.export.diffusers_pipeline import compare_pipelines, to_diffusers
    from fewstep.storage.files import read_json

    names = ("w",) if isinstance(sampler, WithInput) else ("s",)
    made = stirred_student(folders(kind), tmp_path / "student", sampler, names)
    assert to_diffusers(made, tmp_path / "out") <= 1e-5
    index: Any = read_json(tmp_path / "out" / "model_index.json")
    assert index["scheduler"][1] == scheduler
    student = load_student(made)
    assert compare_pipelines(tmp_path / "out", student, "a blue ball") <= 1e-5
    for p in student.denoiser.embeddings.parameters():
        p.data.zero_()
    assert compare_pipelines(tmp_path / "out", student) > 1e-3


@pytest.mark.slow
def test_other_formats_hold_the_bias_too(folders: Folders, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from safetensors.torch import load_file

    from fewstep.export.formats import export

    made = stirred_student(folders("sd"), tmp_path / "student", Jumps(625.0), ("s",))
    assert export(made, tmp_path / "it.safetensors", "safetensors") == 0
    assert export(made, tmp_path / "comfy", "comfyui") <= 1e-5
    assert export(made, tmp_path / "whole.safetensors", "checkpoint") == 0
    mine, plainly = load_file(tmp_path / "it.safetensors"), load_student(made).denoiser.net.net.net
    own = plainly.state_dict()
    changed = [name for name in mine if not torch.equal(mine[name], own[name])]
    assert changed == ["time_embedding.linear_2.bias"]
    with pytest.raises(ValueError, match=r"has further inputs \(s\), which the networks of stock"):
        export(made, tmp_path / "adapter", "lora")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "steps", "why"),
    [("sd3", 4, "differ between its 4 calls"), ("flux2", 1, "no bias of its time embedding can")],
)
def test_what_no_bias_can_hold_is_refused(
    folders: Folders, tmp_path: Path, kind: str, steps: int, why: str
) -> None:
    pytest.importorskip("diffusers")
    from fewstep.export.formats import export

    made = stirred_student(folders(kind), tmp_path / "student", Jumps(1.0, steps), ("s",))
    with pytest.raises(ValueError, match=rf"{why}.* --to pt2 and --to onnx write any"):
        export(made, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_control_the_scheduler_for_jumps_ends_before_the_data() -> None:
    """TCD's last step, without noise of its own, keeps the noise of timestep 0."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.TCDScheduler()
    scheduler.set_timesteps(1)
    t, x, eps = scheduler.timesteps[0], torch.randn(9), torch.randn(9)
    alpha, first = (scheduler.alphas_cumprod[i] for i in (t, 0))
    x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    end = scheduler.step(eps, t, x, eta=0.0).prev_sample
    torch.testing.assert_close(end, first.sqrt() * x0 + (1 - first).sqrt() * eps)
    assert (end - x0).abs().max() > 1e-3 * x0.abs().max()
