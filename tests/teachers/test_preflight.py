"""The pre-flight check on networks whose right answer is known: mixtures in 64 dimensions.

The right teacher passes with gains of at least 0.85 at all five levels, the rest for 0.75;
each wrong prediction type, and Stable Diffusion's betas taken for DDPM's, are refused, though the
samples they are judged on came through the wrong reading itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.denoisers import Eps, V, Velocity
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise_path import VP, Flow, NoisePath, x0_to_eps, x0_to_v, x0_to_velocity
from fewstep.diffusion.types import Cond
from fewstep.teachers.diffusers.scheduler_config import Schedule, Timesteps
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.teachers.preflight import GAIN, LINEAR, LOG_SNR, preflight, time_of

SD, DDPM, FLOW = Timesteps(), Timesteps(1e-4, 0.02, schedule="linear"), Flow()
SIZE = 64


def mixture(path: NoisePath, scale: float) -> GaussianMixture:
    """Ten Gaussians near planes of eight dimensions."""
    g = torch.Generator().manual_seed(1)
    means = torch.randn(10, SIZE, generator=g, dtype=torch.float64) * 0.8 * scale
    low = torch.randn(10, SIZE, 8, generator=g, dtype=torch.float64) * 0.3 * scale
    covs = low @ low.mT + 0.01 * scale**2 * torch.eye(SIZE, dtype=torch.float64)
    return GaussianMixture(means, covs, path=path).double()


class Exact(nn.Module):
    """The network of a perfect teacher: what it predicts, on the path it was trained on."""

    def __init__(self, mix: GaussianMixture, predicts: str) -> None:
        super().__init__()
        self.mix, self.predicts = mix, predicts

    def forward(self, x: Tensor, label: Tensor, cond: Cond = None) -> Tensor:
        x, t = x.double(), label.double()
        law = {"eps": x0_to_eps, "v": x0_to_v, "velocity": x0_to_velocity}[self.predicts]
        return law(self.mix.path, x, self.mix(x, t), t).float()


@dataclass(frozen=True)
class Case:
    """What a network is, and what its files say."""

    path: NoisePath
    predicts: str
    says_path: NoisePath
    says: str

    def teacher(self, scale: float = 1.0) -> Generator:
        wrapper = {"eps": Eps, "v": V, "velocity": Velocity}[self.says]
        denoiser = wrapper(Exact(mixture(self.path, scale), self.predicts), self.says_path)
        sampler = Schedule(self.says_path, self.says).sampler()
        return Generator(denoiser, sampler, (SIZE,))


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    ("path", "predicts"), [(SD, "eps"), (SD, "v"), (DDPM, "eps"), (FLOW, "velocity")]
)
def test_the_right_teacher_passes(path: NoisePath, predicts: str, scale: float) -> None:
    levels = preflight(Case(path, predicts, path, predicts).teacher(scale), None)
    assert len(levels) == len(LOG_SNR)
    assert all(level.gain > 0.85 and level.error < 1.0 for level in levels)


WRONG = {
    "eps taken for v": Case(SD, "eps", SD, "v"),
    "v taken for eps": Case(SD, "v", SD, "eps"),
    "eps taken for v, DDPM": Case(DDPM, "eps", DDPM, "v"),
    "SD's betas taken for DDPM's": Case(SD, "eps", DDPM, "eps"),
    "v taken for eps, DDPM": Case(DDPM, "v", DDPM, "eps"),
    "DDPM's betas taken for SD's": Case(DDPM, "eps", SD, "eps"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_wrong_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the teacher does not denoise as its files say: "):
        preflight(WRONG[name].teacher(), None)


def test_real_data_are_judged_too() -> None:
    right, wrong = Case(SD, "v", SD, "v").teacher(), WRONG["v taken for eps"].teacher()
    x = mixture(SD, 1.0).sample(8, torch.Generator().manual_seed(2)).float()
    assert min(level.gain for level in preflight(right, None, x)) > 0.93
    with pytest.raises(ValueError, match="look at the scheduler's prediction_type and betas"):
        preflight(wrong, None, x)


class Nonsense(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, label: Tensor, cond: Cond = None) -> Tensor:
        return self.scale * torch.sin(50 * x)


@pytest.mark.parametrize("scale", [3.0, float("nan")])
def test_a_network_of_nonsense_is_refused(scale: float) -> None:
    """It beats no linear denoiser, and what is not a number is no gain."""
    denoiser = Eps(Nonsense(scale), SD)
    teacher = Generator(denoiser, Schedule(SD, "eps").sampler(), (SIZE,))
    with pytest.raises(ValueError, match="the teacher does not denoise as its files say"):
        preflight(teacher, None)


@pytest.mark.parametrize("path", [SD, DDPM, FLOW, VP(betas=(0.1, 0.2, 0.3))])
@pytest.mark.parametrize("log_snr", LOG_SNR)
def test_times_of_levels(path: NoisePath, log_snr: float) -> None:
    """ln(alpha^2/sigma^2), or the end of the range."""
    t = torch.tensor(time_of(path, log_snr), dtype=torch.float64)
    found = 2 * (path.alpha(t).log() - path.sigma(t).log())
    at_end = min(abs(float(t) - path.t_min), abs(float(t) - path.t_max)) < 1e-6
    assert at_end or abs(float(found) - log_snr) < 1e-6
    assert not at_end or not isinstance(path, Timesteps)
    assert (GAIN, LINEAR) == (0.75, 1.5)


class Silent(nn.Module):
    """v = 0 is the exact denoiser of standard normal data; eps = 0 that of endless data."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, label: Tensor, cond: Cond = None) -> Tensor:
        return self.zero * x


def test_samples_of_another_scale_are_refused() -> None:
    """eps = 0 agrees with itself at every level; its samples are z / alpha, 15 times too large."""
    assert min(level.gain for level in preflight(_silent("v"), None)) > 0.98
    with pytest.raises(ValueError, match=r"have the standard deviation 14\.\d, where about one"):
        preflight(_silent("eps"), None)


def _silent(says: str) -> Generator:
    denoiser = (Eps if says == "eps" else V)(Silent(), SD)
    return Generator(denoiser, Schedule(SD, says).sampler(), (SIZE,))
