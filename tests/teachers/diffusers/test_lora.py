"""Adapters on the networks of pipelines."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from fewstep.data.embeddings import Conditioned, Embeddings, key
from fewstep.diffusion.noise_path import Flow
from fewstep.nets.lora import LoRA, pairs
from fewstep.teachers.diffusers.load import load_pipeline
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from tests.conftest import Folders
from tests.nets.test_lora import adapters, storages
from tests.teachers.diffusers.test_all_architectures import TEXTS, methods

pytestmark = pytest.mark.slow

ATTENDING = {"to_q", "to_k", "to_v", "to_out", "to_add_out"}

UNHEARD = {f"net.net.transformer_blocks.1.attn.{name}" for name in ("add_q_proj", "to_add_out")}
"""The last blocks of SD3 and Qwen-Image drop what the prompt's queries found."""


@pytest.mark.parametrize(
    "kind", ["sd", "sdxl", "sd3", "pixart", "sana", "flux", "flux2", "qwen_image", "z_image"]
)
def test_a_pipeline_is_distilled_on_one_set_of_weights(
    folders: Folders, tmp_path: Path, kind: str
) -> None:
    """A role is the teacher to the bit, moves in two steps, and the teacher does not."""
    teacher = load_pipeline(folders(kind))
    net, lora = teacher.denoiser, LoRA(2)
    role = lora.adapt(net)
    layers = pairs(role.state_dict())
    ends = {layer.removesuffix(".0").rpartition(".")[2] for layer in layers}
    assert ends - {"add_q_proj", "add_k_proj", "add_v_proj"} <= ATTENDING
    assert {"to_q", "to_out"} <= ends
    table = Embeddings(tmp_path)
    list(table.fill(TEXTS, teacher.text))
    flow = isinstance(net.path, Flow)
    x, t = torch.randn(3, *teacher.shape), torch.tensor([0.3, 0.6, 0.9]) * (1 if flow else 1000)
    assert teacher.text is not None
    with torch.no_grad():
        for cond in (None, teacher.text(TEXTS)):
            assert torch.equal(role(x, t, cond), net(x, t, cond))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    method = methods(teacher)["SiD-LSG"]
    source = Conditioned(teacher.shape, table, [key(text) for text in TEXTS])
    *_, last = train(method, net, role, source, batch=2, steps=2, optim=Optim(1e-3))
    assert last.logs["skipped"] == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    state = last.state
    for other in state.nets.values():
        still = {k for k, (_, up) in pairs(other.state_dict()).items() if not up.count_nonzero()}
        assert still <= UNHEARD
    roles = [*state.nets.values(), state.average]
    assert storages(net, *roles) == storages(net) + 3 * adapters(role)
    whole = teacher.model.build() if teacher.model is not None else None
    assert whole is not None
    student = state.nets["student"]
    whole.load_state_dict(lora.merged(net.state_dict(), student.state_dict()))
    with torch.no_grad():
        assert (student(x, t) - net(x, t)).abs().max() > 1e-4
        both = [copy.deepcopy(one).double()(x.double(), t.double()) for one in (whole, student)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)
