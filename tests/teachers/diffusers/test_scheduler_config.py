"""What a scheduler's configuration says, beside diffusers' own scheduler of that configuration."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import Folders

pytest.importorskip("diffusers")

import diffusers

from fewstep.diffusion.noise_path import Flow, perturb, x0_to_eps, x0_to_v
from fewstep.diffusion.samplers import Heun
from fewstep.diffusion.time_distributions import Shifted, Uniform
from fewstep.teachers.diffusers.families import SCHEDULERS
from fewstep.teachers.diffusers.folder import open_folder
from fewstep.teachers.diffusers.load import read_schedule
from fewstep.teachers.diffusers.scheduler_config import (
    ONLY,
    READ,
    SAMPLING,
    Timesteps,
    schedule_of,
)
from fewstep.teachers.gaussian import Gaussian

SCHEDULES = {
    "SD": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "DDPM, PixArt": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "own betas": {"trained_betas": [0.01, 0.02, 0.3, 0.4]},
    "zero SNR": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_path_is_the_schedulers(name: str) -> None:
    """alpha_t^2 is alphas_cumprod at every timestep."""
    s = diffusers.DDIMScheduler(**SCHEDULES[name])
    found = schedule_of(dict(s.config), "DDIMScheduler")
    t = torch.arange(len(s.alphas_cumprod), dtype=torch.float64)
    alpha, sigma = found.path.alpha(t), found.path.sigma(t)
    assert isinstance(found.path, Timesteps)
    assert torch.equal(found.path.label(t), t)
    assert (alpha**2 - s.alphas_cumprod.double()).abs().max() < 2e-6
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(t))
    assert found.predicts == ("v" if name == "zero SNR" else "eps")
    other = {**s.config, "trained_betas": None, "beta_schedule": "linear", "beta_end": 0.03}
    wrong = schedule_of(other, "DDIMScheduler").path.alpha(t)
    assert (wrong[: len(t)] ** 2 - s.alphas_cumprod.double()).abs().max() > 0.01


@pytest.mark.parametrize("steps", [4, 50])
@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        *((name, "leading") for name in ("SD", "DDPM, PixArt", "cosine", "zero SNR")),
        *((name, "trailing") for name in ("SD", "DDPM, PixArt")),
    ],
)
def test_heun_of_order_one_is_stock_ddim(name: str, steps: int, spacing: str) -> None:
    """From the same start to the same end, to 1e-5, where float32 tells alpha from zero."""
    more = {"timestep_spacing": spacing, "clip_sample": False, "set_alpha_to_one": True}
    s = diffusers.DDIMScheduler(**SCHEDULES[name], **more)
    found = schedule_of(dict(s.config), "DDIMScheduler")
    s.set_timesteps(steps)
    first, last = float(s.timesteps[0]), float(s.timesteps[-1])
    mean, spread = torch.tensor([0.4, -0.7]), torch.tensor([0.5, 0.2])
    teacher = Gaussian(mean, spread, found.path)
    z = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    x = z * found.path.sigma(torch.tensor(first))
    told = {"eps": x0_to_eps, "v": x0_to_v}[found.predicts]
    for t in s.timesteps:
        at = t.float()
        x = s.step(told(found.path, x, teacher(x, at), at), t, x).prev_sample
    ours = Heun(Uniform(last, first), steps, order=1)(teacher, z)
    assert (ours - x).abs().max() < 1e-5
    assert (Heun(Uniform(last, first), steps)(teacher, z) - x).abs().max() > 1e-4


def test_a_flow_and_its_shift() -> None:
    """x_t is the scheduler's, and the default ladder is its shifted one."""
    s = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = schedule_of(dict(s.config), "FlowMatchEulerDiscreteScheduler")
    assert (found.path, found.predicts, found.shift) == (Flow(), "velocity", 3.0)
    torch.manual_seed(5)
    x, eps = torch.randn(2, 3), torch.randn(2, 3)
    t = s.timesteps[[200, 700]]
    assert torch.allclose(perturb(found.path, x, eps, t / 1000), s.scale_noise(x, t, eps))
    s.set_timesteps(28)
    ladder = found.sampler().grid(torch.zeros(1))
    # diffusers shifts its own end of the ladder, 1/1000, twice: the ladders meet above it
    assert (ladder[:20] - s.sigmas[:20]).abs().max() < 2e-3


def test_a_shift_that_depends_on_the_size(folders: Folders) -> None:
    """FLUX's, as its pipeline computes it, and the same scheduler at another size."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0).config
    for places in (16, 1024, 4096):
        mu = torch.tensor(calculate_shift(places))
        found = schedule_of(dict(config), "FlowMatchEulerDiscreteScheduler", places)
        assert abs(found.shift - float(mu.exp())) < 1e-6 * found.shift
        s = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        s.set_timesteps(sigmas=[1.0, 0.7, 0.2], mu=float(mu))
        ours = Shifted(found.shift).quantile(torch.tensor([1.0, 0.7, 0.2]))
        assert torch.allclose(s.sigmas[:3], ours)
    assert read_schedule(open_folder(folders("flux_guided"))).shift == pytest.approx(
        float(torch.tensor(calculate_shift(16)).exp())
    )
    assert read_schedule(open_folder(folders("flux"))).shift == 1.0


def test_every_key_of_every_scheduler_is_known() -> None:
    """To matter, to matter unless it has one value, or not to matter; none twice."""
    groups = (READ, tuple(ONLY), SAMPLING)
    known = [key for group in groups for key in group]
    assert len(known) == len(set(known))
    keys = {
        key
        for name in SCHEDULERS
        for key in inspect.signature(getattr(diffusers, name).__init__).parameters
    }
    assert keys - {"self"} == set(known)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type 'continuous'"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas True"),
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 500}, "is told 1000 t"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": None}, "shift should be a number, got None"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": -1.0}, "shifts its times by -1"),
        ("DDIMScheduler", {"beta_start": "1e-4"}, "beta_start should be a number, got '1e-4'"),
        ("DDIMScheduler", {"beta_end": float("inf")}, "beta_end should be a number, got inf"),
        ("DDIMScheduler", {"beta_end": None}, "beta_end should be a number, got None"),
        ("DDIMScheduler", {"beta_schedule": ["linear"]}, "has beta_schedule"),
        ("DDIMScheduler", {"trained_betas": 0.1}, "trained_betas should be a list"),
        ("DDIMScheduler", {"trained_betas": [0.1, 2.0]}, "should be between 0 and 1"),
        ("DDIMScheduler", {"num_train_timesteps": 10**400}, "num_train_timesteps should be a"),
    ],
)
def test_what_would_change_the_network_is_refused(
    name: str, changes: dict[str, object], message: str
) -> None:
    config = dict(getattr(diffusers, name)().config)
    schedule_of(config, name)
    with pytest.raises(ValueError, match=message):
        schedule_of({**config, **changes}, name)


@pytest.mark.parametrize("key", SAMPLING)
def test_what_changes_sampling_alone_changes_nothing(key: str) -> None:
    """Whatever it says."""
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"):
        config = dict(getattr(diffusers, name)().config)
        for value in (True, False, 3, "x", None):
            assert schedule_of({**config, key: value}, name) == schedule_of(config, name)


def test_the_file_of_a_scheduler_is_named(folders: Folders, tmp_path: Path) -> None:
    """Whichever of its keys is refused; one of another scheduler is passed over, as by stock."""
    folder = tmp_path / "pipe"
    shutil.copytree(folders("sd"), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "solver_order": 3, "skip_prk_steps": True}))
    assert read_schedule(open_folder(folder)) == read_schedule(open_folder(folders("sd")))
    for changes in ({"beta_schedule": "own"}, {"beta_start": None}, {"network_scale": 2.0}):
        path.write_text(json.dumps({**told, **changes}))
        with pytest.raises(ValueError, match=r"scheduler/scheduler_config.json"):
            read_schedule(open_folder(folder))
