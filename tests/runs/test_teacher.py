"""What a run's teacher brings beside its denoiser."""

from __future__ import annotations

import pytest
import torch

from fewstep.distillation.pictures import pictures_of
from fewstep.domains.prompts import Prompts
from fewstep.runs.teacher import load_teacher
from tests.conftest import Folders

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["sd", "sd3", "sana"])
def test_losses_see_what_the_vae_of_a_pipeline_decodes(folders: Folders, kind: str) -> None:
    """The stock decoder, with its gradient; no weight of it moves, no name joins the network."""
    teacher = load_teacher(Prompts("unused.txt"), str(folders(kind)))
    assert teacher is not None
    net = teacher.denoiser
    assert not any("decoder." in name and "vae" in name for name in net.state_dict())
    x = torch.randn(2, *teacher.shape, requires_grad=True)
    made = pictures_of(net, x)
    assert torch.equal(made.detach(), teacher.decode(x.detach()))
    along, h = torch.randn_like(x), 1e-3
    with torch.no_grad():
        moved = (pictures_of(net, x + h * along) - pictures_of(net, x - h * along)).double()
    (grad,) = torch.autograd.grad(made.sum(), x)
    expected = (moved / (2 * h)).sum().item()
    assert (grad * along).double().sum().item() == pytest.approx(expected, rel=1e-2)
    assert grad.abs().max() > 1e-3
