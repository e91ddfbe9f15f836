"""What is exported is loaded by stock diffusers, in another process too, and is the student.

Relative to the largest latent, to 1e-5. Negative controls: the teacher's own scheduler in the
same folder, and other weights, are far off.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import Folders

pytest.importorskip("diffusers")

import diffusers
from safetensors import safe_open
from safetensors.torch import load_file

from fewstep.diffusion.linear_solver import LinearSolver
from fewstep.diffusion.noise_path import VE, VP, Flow
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Sampler
from fewstep.export import diffusers_pipeline, traced_generator
from fewstep.export.diffusers_pipeline import (
    against,
    compare_pipelines,
    to_diffusers,
    to_safetensors,
)
from fewstep.export.fewstep_solver import FewstepSolver
from fewstep.export.schedulers import betas, call, stock_scheduler
from fewstep.export.traced_generator import by_last_place
from fewstep.storage.model_folder import load_student, save_model
from fewstep.teachers.diffusers.load import load_pipeline, with_text_and_vae
from fewstep.teachers.diffusers.scheduler_config import Timesteps, schedule_of

pytestmark = pytest.mark.slow

TRAJECTORIES = {
    "sd": (
        FewStep(625.0),
        FewStep(625.0, unit=True),
        FewStep(999.0, 4, unit=True),
        FewStep(625.0, 3, unit=True),
    ),
    "sd_v": (FewStep(625.0), FewStep(999.0, 4, "ddim", unit=True)),
    "sdxl": (FewStep(399.0), FewStep(999.0, 4, unit=True)),
    "pixart": (FewStep(399.0, unit=True), FewStep(999.0, 2, unit=True)),
    "pixart_sigma": (FewStep(999.0, 4, unit=True),),
    "sd3": (FewStep(1.0), FewStep(1.0, 4), FewStep(1.0, 2, "ddim")),
    "sana": (FewStep(1.0), FewStep(1.0, 4)),
    "flux": (FewStep(1.0), FewStep(1.0, 4)),
    "flux_guided": (FewStep(1.0, 2), FewStep(1.0, 4, "ddim")),
    "sd_bert": (FewStep(625.0),),
    "sd35": (FewStep(1.0, 4),),
    "flux2": (FewStep(1.0), FewStep(1.0, 4)),
    "qwen_image": (FewStep(1.0, 2), FewStep(1.0, 4, "ddim")),
    "z_image": (FewStep(1.0), FewStep(1.0, 4)),
}
CASES = [(kind, sampler) for kind, samplers in TRAJECTORIES.items() for sampler in samplers]


def student(folder: Path, home: Path, sampler: Sampler) -> Path:
    """A student of the pipeline in `folder` whose weights are not the teacher's."""
    teacher = load_pipeline(folder)
    old = teacher.denoiser.state_dict()
    state = {k: v * 1.1 if k.endswith("weight") else v for k, v in old.items()}
    save_model(home, state, teacher.model, sampler, {"teacher": dict(teacher.card)})
    return home


def ran(text: str, where: Path, **names: Any) -> dict[str, Any]:
    """What the Python of a card leaves behind, run in the folder `where` with these names."""
    with contextlib.chdir(where):
        exec(text.split("```python\n")[1].split("```")[0], names)
    return names


@pytest.mark.parametrize(("kind", "sampler"), CASES, ids=str)
def test_stock_diffusers_samples_the_student(
    folders: Folders, tmp_path: Path, kind: str, sampler: FewStep
) -> None:
    made = student(folders(kind), tmp_path / "student", sampler)
    assert to_diffusers(made, tmp_path / "out") <= 1e-5
    assert compare_pipelines(tmp_path / "out", load_student(made), "a blue ball") <= 1e-5
    assert not list(tmp_path.rglob("*partial*"))
    other = json.loads((folders(kind) / "scheduler" / "scheduler_config.json").read_text())
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    (tmp_path / "out" / "scheduler" / "scheduler_config.json").write_text(json.dumps(other))
    index["scheduler"] = ["diffusers", other["_class_name"]]
    (tmp_path / "out" / "model_index.json").write_text(json.dumps(index))
    if sampler.steps > 1 or kind == "sd":
        assert compare_pipelines(tmp_path / "out", load_student(made)) > 1e-3


def test_rounding_is_told_from_a_fault(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 32 last places of the noise pass where that is more than 1e-5; more never does."""
    made = student(folders("sd"), tmp_path / "student", FewStep(999.0, 4, unit=True))
    place = by_last_place(load_student(made))
    assert 2.0**-26 < place < 1e-5
    off = (49e-6, 51e-6)
    monkeypatch.setattr(traced_generator, "by_last_place", lambda student: 50e-6 / 32)
    for difference, name in zip(off, ("passes", "refused"), strict=True):
        monkeypatch.setattr(diffusers_pipeline, "compare_pipelines", lambda *_, d=difference: d)
        if name == "passes":
            assert to_diffusers(made, tmp_path / name) == difference
            continue
        with pytest.raises(ValueError, match=r"by 5\.1e-05 of its range, more than 5e-05"):
            to_diffusers(made, tmp_path / name)
        assert not (tmp_path / name).exists()


SOLVERS = [
    ("sd", LinearSolver(3, order=2)),
    ("sd_v", LinearSolver(3)),
    ("sd3", LinearSolver(3, order=3)),
    ("flux", LinearSolver(3)),
    ("pixart", LinearSolver(2)),
    (
        "sdxl",
        LinearSolver(
            times=(900.0, 300.0),
            told=(880.5, 310.0),
            a=((0.4,), (0.05, 0.02)),
            c=((0.6,), (-0.1, 0.9)),
        ),
    ),
    ("sd", FewStep(noise="ddim", times=(999.0, 400.0, 50.0))),
    ("sd", FewStep(noise="ddim", times=(999.0, 400.0, 50.0), unit=True)),
]


@pytest.mark.parametrize(("kind", "sampler"), SOLVERS, ids=str)
def test_a_solver_of_its_own_is_code_in_the_folder(
    folders: Folders, tmp_path: Path, kind: str, sampler: Sampler
) -> None:
    """Loaded by diffusers with its code; with another solver's numbers it is far off."""
    made = student(folders(kind), tmp_path / "student", sampler)
    assert to_diffusers(made, tmp_path / "out") <= 1e-5
    text = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True" in text
    assert "scheduler/fewstep_solver.py" in text
    if kind == "sd":  # as a user loads it
        out = str(tmp_path / "out")
        pipe = diffusers.DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
        assert type(pipe.scheduler).__module__.endswith("fewstep_solver")
        assert against(pipe, load_student(made), "a blue ball") <= 1e-5
    home = tmp_path / "out" / "scheduler"
    config = json.loads((home / "scheduler_config.json").read_text())
    config["c"][-1][-1] *= 1.1
    (home / "scheduler_config.json").write_text(json.dumps(config))
    assert compare_pipelines(tmp_path / "out", load_student(made)) > 1e-3
    (home / "fewstep_solver.py").write_text("raise SystemExit")  # other code is never run
    with pytest.raises(ValueError, match=r"holds code \(scheduler/fewstep_solver\.py\)"):
        compare_pipelines(tmp_path / "out", load_student(made))


def test_a_solver_of_its_own_has_its_number_of_steps() -> None:
    scheduler = FewstepSolver([9.0, 4.0], [1.0, 1.0], [1.0, 0.5], [[0], [0, 0]], [[1], [0, 1]])
    with pytest.raises(ValueError, match="this solver has 2 steps, got 3"):
        scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="starts at its first step"):
        scheduler.set_begin_index(1)


ALONE = """
import sys, torch
from diffusers import DiffusionPipeline
folder, steps, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder)
torch.manual_seed(3)
z = torch.randn(2, 4, 8, 8)
picture = pipe(["a red cube", "a blue ball"], num_inference_steps=int(steps), guidance_scale=0,
               latents=z, height=16, width=16, output_type="pt").images
assert not any(name.startswith("fewstep") for name in sys.modules)
torch.save(picture, out)
"""


def test_in_another_process(folders: Folders, tmp_path: Path) -> None:
    """Two prompts, pictures through the VAE, nothing of fewstep in the process."""
    sampler = FewStep(999.0, 2, unit=True)
    made = student(folders("sd"), tmp_path / "student", sampler)
    to_diffusers(made, tmp_path / "out")
    args = [sys.executable, "-c", ALONE, tmp_path / "out", "2", tmp_path / "picture.pt"]
    subprocess.run(list(map(str, args)), check=True, capture_output=True, cwd=tmp_path)
    found = torch.load(tmp_path / "picture.pt", weights_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        z, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    ours = with_text_and_vae(load_student(made))
    cond = ours.text(["a red cube", "a blue ball"])
    x = ours.denoiser(z, torch.tensor(999.0), cond)
    path, at = ours.denoiser.path, torch.tensor(499.0)
    x = ours.denoiser(path.alpha(at) * x + path.sigma(at) * eps, at, cond)
    picture = ((ours.decode(x) + 1) / 2).clamp(0, 1)
    assert (found - picture).abs().max() < 1e-5
    assert picture.std() > 0.01


def test_the_card_says_how(folders: Folders, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(folders("sd"), teacher)
    (teacher / "README.md").write_text("---\nlicense: openrail\n---\n")
    (teacher / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    made = student(teacher, tmp_path / "student", FewStep(999.0, 4, unit=True))
    to_diffusers(made, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    head = text.split("---\n")[1]
    assert "library_name: diffusers\n" in head
    assert "base_model:" not in head  # a folder of this machine is none that the hub knows
    assert "license: openrail\n" in head
    assert "| licence | openrail (the teacher's) |" in text
    assert "| steps | 4, at t = 999, 749, 499, 249 of Timesteps |" in text
    assert "| starts from | standard normal z of [4, 8, 8] |" in text
    assert "| scheduler | LCMScheduler, which has these steps already |" in text
    assert "num_inference_steps=4, guidance_scale=0" in text
    names = ran(text, tmp_path)
    assert against(names["pipe"], load_student(made)) <= 1e-5
    assert names["picture"].size == (16, 16)
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not any(name.endswith((".bin", ".py", ".pt")) for name in files)


def test_the_network_alone(folders: Folders, tmp_path: Path) -> None:
    """Under diffusers' names, with what it is in the header."""
    made = student(folders("sd"), tmp_path / "student", FewStep(625.0))
    assert to_safetensors(made, tmp_path / "net.safetensors") == 0
    found, teacher = (
        load_file(tmp_path / "net.safetensors"),
        load_pipeline(folders("sd")).denoiser.net.net,
    )
    assert found.keys() == teacher.state_dict().keys()
    assert torch.equal(found["conv_in.weight"], teacher.conv_in.weight * 1.1)
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert file.metadata()["sampler"] == repr(FewStep(625.0))
    text = (tmp_path / "net.safetensors.md").read_text()
    sigma = Timesteps().sigma(torch.tensor(625.0, dtype=torch.float64))
    assert f"standard normal z of [4, 8, 8], which is multiplied by {sigma:.5g} |" in text
    assert "| licence | unknown: the teacher's, see there |" in text
    network = ran(text, tmp_path)["network"]
    assert torch.equal(network.conv_in.weight, found["conv_in.weight"])
    with pytest.raises(ValueError, match=r"should be a new file that ends in .safetensors"):
        to_safetensors(made, tmp_path / "net.safetensors")


def test_cards_tell_the_scale_and_size_that_pipelines_do_not_know(
    folders: Folders, tmp_path: Path
) -> None:
    """FLUX's network records no size; those of Sana and PixArt are moved to another."""
    calls = {
        "flux": "0, height=16, width=16",
        "flux_guided": "3.5, height=16, width=16",
        "sana": "0, height=32, width=32, use_resolution_binning=False",
    }
    for kind, words in calls.items():
        made = student(folders(kind), tmp_path / kind, FewStep(1.0))
        to_diffusers(made, tmp_path / f"{kind}-out")
        text = (tmp_path / f"{kind}-out" / "README.md").read_text()
        assert f"num_inference_steps=1, guidance_scale={words})" in text
        assert f"width={ran(text, tmp_path)['picture'].size[0]}" in words


REFUSED = {
    "no stock scheduler repeats the same noise": (FewStep(999.0, 4, "fixed"), Timesteps(), "eps"),
    "stock schedulers space their times evenly": (FewStep(999.0, 4, rho=2.0), Timesteps(), "eps"),
    r"trained with FewStep\(unit=True\)": (FewStep(999.0, 4), Timesteps(), "eps"),
    "the schedulers of PixArtAlphaPipeline in 1 steps start at": (FewStep(9.0), Timesteps(), "v"),
    "stock schedulers of flows start at t = 1": (FewStep(0.9, 4), Flow(), "velocity"),
    "no stock scheduler is known for edm": (FewStep(2.5), VE(), "edm"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_no_scheduler_carries_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stock_scheduler(*REFUSED[message], "PixArtAlphaPipeline")


@pytest.mark.parametrize(("t", "steps"), [(999, 4), (999, 3), (625, 4), (625, 1), (399, 1)])
def test_schedulers_count_as_the_student_does(t: int, steps: int) -> None:
    sampler = FewStep(float(t), steps, unit=steps > 1)
    kind, config = stock_scheduler(sampler, Timesteps(), "eps", "StableDiffusionPipeline")
    scheduler = getattr(diffusers, kind)(**config)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == sampler.ladder(Timesteps())
    abar = Timesteps().alpha(torch.tensor([float(t)], dtype=torch.float64)) ** 2
    assert abs(float(scheduler.alphas_cumprod[-1]) - float(abar)) < 1e-6


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("case", [(999, 4, "fresh"), (999, 2, "ddim"), (625, 1, "fresh")])
def test_a_scheduler_as_python(case: tuple[int, int, str], rescale: bool) -> None:
    """It counts as the configuration does, and takes its betas from the teacher's scheduler."""
    t, steps, noise = case
    betas_of = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    told = {**betas_of, "num_train_timesteps": 1000, "rescale_betas_zero_snr": rescale}
    sampler = FewStep(float(t), steps, noise, unit=steps > 1)  # type: ignore[arg-type]
    path = schedule_of(told, "DDIMScheduler").path
    kind, config = stock_scheduler(sampler, path, "v", "StableDiffusionPipeline")
    pipe = SimpleNamespace(scheduler=diffusers.DDIMScheduler(**told))
    code = call(kind, config)
    assert len(code) < 300
    found = eval(code, {"pipe": pipe, kind: getattr(diffusers, kind)})
    ours = getattr(diffusers, kind)(**config)
    torch.testing.assert_close(found.alphas_cumprod, ours.alphas_cumprod, rtol=2e-5, atol=1e-7)
    for key, value in config.items():
        assert key == "trained_betas" or found.config[key] == value


def test_flow_ladders() -> None:
    for steps in (1, 2, 4, 8):
        _, config = stock_scheduler(FewStep(1.0, steps), Flow(), "velocity", "SanaPipeline")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
        scheduler.set_timesteps(steps)
        wanted = torch.tensor(FewStep(1.0, steps).ladder(Flow()))
        assert torch.allclose(scheduler.sigmas[:-1], wanted, atol=1e-6)


def test_betas_are_given_back() -> None:
    path = VP(betas=(0.01, 0.05, 0.2, 0.5))
    assert betas(path) == pytest.approx(path.betas, abs=1e-12)


def test_refusals(folders: Folders, tmp_path: Path) -> None:
    made = student(folders("sd"), tmp_path / "student", FewStep(625.0))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(ValueError, match="exists already; choose a new or empty folder"):
        to_diffusers(made, tmp_path / "taken")
    teacher = load_pipeline(folders("sd"))
    card = {"teacher": {**teacher.card, "text": "0" * 64}}
    state = teacher.denoiser.state_dict()
    save_model(tmp_path / "other", state, teacher.model, FewStep(625.0), card)
    with pytest.raises(ValueError, match="has other text encoders than this model was trained"):
        to_diffusers(tmp_path / "other", tmp_path / "out")
    card = {"teacher": {**teacher.card, "folder": str(tmp_path / "gone")}}
    save_model(tmp_path / "lost", state, teacher.model, FewStep(625.0), card)
    with pytest.raises(ValueError, match="gone, which is not there; put it back"):
        to_diffusers(tmp_path / "lost", tmp_path / "out")
    assert not (tmp_path / "out").exists()
