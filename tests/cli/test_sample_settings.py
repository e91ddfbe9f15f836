"""Names of samplers as other programs have them."""

from __future__ import annotations

import pytest
import torch

from fewstep.cli.sample_settings import client_name
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath
from fewstep.diffusion.samplers import Ancestral, FewStep, Heun, MultiStep
from fewstep.diffusion.time_distributions import Karras, Shifted
from fewstep.diffusion.types import Sampler
from fewstep.teachers.gaussian import Gaussian


@pytest.mark.parametrize(
    ("sampler", "path", "name"),
    [
        (FewStep(625.0), VP(), "LCM"),
        (FewStep(999.0, 4, "ddim"), VP(), "DDIM"),
        (FewStep(1.0, 4, "ddim"), Flow(), "Euler"),
        (CFG(Heun(Shifted(), 28, 1), 3.0), Flow(), "Euler"),
        (Heun(Karras(), 18), VE(), "Heun"),
        (MultiStep(Karras(), 9, "dpm++"), VE(), "DPM++ 2M"),
        (MultiStep(Karras(), 9, "unipc"), VE(), "UniPC"),
        (Ancestral(2.0, 4), VE(), "Ancestral"),
    ],
    ids=repr,
)
def test_names(sampler: Sampler, path: NoisePath, name: str) -> None:
    made = Generator(Gaussian(torch.zeros(2), torch.eye(2), path), sampler, (2,))
    assert client_name(made) == name
