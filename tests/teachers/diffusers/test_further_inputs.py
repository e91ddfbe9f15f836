"""Flow maps of networks of diffusers: their further inputs, and derivatives of them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Folders

pytest.importorskip("diffusers")

from fewstep.diffusion.derivative import difference_step, jvp
from fewstep.diffusion.extra_inputs import ExtraInputs
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.samplers import Jumps
from fewstep.export.comfyui import to_comfyui
from fewstep.export.diffusers_pipeline import to_diffusers
from fewstep.export.traced_generator import examples
from fewstep.methods.ctm import CTM
from fewstep.nets.activation_checkpointing import recompute
from fewstep.nets.lora import LoRA
from fewstep.storage.model_folder import load_student, save_student
from fewstep.teachers.diffusers.adapter_base import adapter_of
from fewstep.teachers.diffusers.load import load_pipeline
from tests.networks import stirred
from tests.parameters import families

KINDS = (
    *("sd", "sdxl", "sd3", "pixart", "pixart_sized", "sana", "flux", "flux_guided"),
    *("flux2", "qwen_image", "z_image"),
)
ROUNDED = {"sana": 1e-4, "qwen_image": 2e-3, "z_image": 5e-3}
"""Bounds of networks with kinks, or that compute a part in float32 whatever they are given."""
COARSE = {"z_image": 0.1}
"""Bounds of derivatives by differences in float32; 0.083 was measured, without a known cause."""
each_kind = pytest.mark.parametrize("kind", families(KINDS))


def inputs(denoiser: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, s), no t being a whole number."""
    net = adapter_of(denoiser)
    shape = (4, 8, 8) if net is None else net.sample_shape
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.31, 0.66])
    t = t if denoiser.path.t_max <= 1 else (1000 * t).floor() + 0.5
    return x, t, t / 3


@each_kind
def test_the_start_is_the_teacher_and_then_inputs_matter(folders: Folders, kind: str) -> None:
    """To the bit, features too, also as an adapted role, and guided in both branches."""
    denoiser = load_pipeline(folders(kind)).denoiser
    x, t, s = inputs(denoiser)
    w = torch.tensor(7.5)
    for inside in (denoiser, LoRA(2).adapt(denoiser)):
        net: Any = ExtraInputs(inside, ("s", "w"))
        with torch.no_grad():
            plain = inside(x, t), inside.encode(x, t)
            assert torch.equal(net(x, t, s=s, w=w), plain[0])
            assert torch.equal(net.encode(x, t, s=s), plain[1])
            stirred(net.embeddings)
            out, features = net.forward_with_features(x, t, s=s)
            assert torch.equal(net.encode(x, t, s=s), features)
            assert torch.equal(net(x, t), plain[0])
            for a, b in ((out, plain[0]), (features, plain[1]), (net(x, t, s=s, w=w), out)):
                assert float((a - b).norm() / b.norm()) > 1e-4
            null = {name: b[None].expand(2, *b.shape) for name, b in inside.net.null().items()}
            mixed = guided(net, x, t, null, [3.0], named={"s": s}).predictions[0]
            torch.testing.assert_close(mixed, out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "kind", families(["sd", "sdxl", "sd3", "pixart", "sana", "flux", *KINDS[-3:]])
)
def test_recomputation_has_the_same_gradients(folders: Folders, kind: str) -> None:
    net: Any = stirred(ExtraInputs(load_pipeline(folders(kind)).denoiser, ("s",)))
    net.requires_grad_(True)
    lean = deepcopy(net)
    recompute(lean)
    x, t, s = inputs(net)
    found = []
    for each in (net, deepcopy(lean)):
        out, features = each.forward_with_features(x, t, s=s)
        (out.square().mean() + features.square().mean()).backward()
        found.append([p.grad for p in each.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 20
    assert all(map(torch.equal, *found))


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@each_kind
def test_derivatives(folders: Folders, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences in float64, the timestep too; in both modes, and recomputed."""
    net: Any = stirred(ExtraInputs(load_pipeline(folders(kind)).denoiser, ("s",)))
    recompute(net)
    primals = inputs(net)
    one = difference_step(net.path, primals[1][0], 1.0)
    v = torch.randn(primals[0].shape, generator=torch.Generator().manual_seed(5)) / one
    exact: Any = deepcopy(net).double()
    x, t, s = (p.double() for p in primals)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Tensor, "float", Tensor.double)  # which diffusers embeds timesteps in
        h = 1e-7 * one.double()
        ends = [exact(x + r * v.double(), t + r, s=s) for r in (-h, h, -h / 2, h / 2)]
        expected = (4 * (ends[3] - ends[2]) / h - (ends[1] - ends[0]) / (2 * h)) / 3
        for training in (True, False):
            exact.train(training)
            slope = jvp(lambda *args: exact(*args[:2], s=args[2]), [x, t, s], [v, 1, 0], net=exact)
            assert off(slope[1], expected) < ROUNDED.get(kind, 1e-6)
            assert all(m.training == training for m in exact.modules())

    def f(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        out: Tensor = net(x, t, s=s)
        return out

    expected = slope[1]  # which differences have met; they are coarser where a part is in float32
    h = difference_step(net.path, primals[1])
    assert off(jvp(f, primals, [v, 1, 0], net=net)[1], expected) < 5e-4
    assert off(
        jvp(f, primals, [v, 1, 0], net=net, how="difference", h=h)[1], expected
    ) < COARSE.get(kind, 6e-3)
    assert off(jvp(f, primals, [v, 0, 0], net=net)[1], expected) > 0.3


def test_a_student_goes_through_its_folder_and_is_no_stock_pipeline(
    folders: Folders, tmp_path: Path
) -> None:
    """To the bit; exports to classes that have no place for its inputs are refused."""
    teacher = load_pipeline(folders("sd"))
    assert teacher.model is not None
    model = replace(teacher.model, inputs=("s",))
    net: Any = stirred(model.build().eval())
    save_student(tmp_path / "student", net, model, CTM(Jumps(500.0, 2, 3.0)), {})
    again = load_student(tmp_path / "student")
    x, t, s = inputs(net)
    with torch.no_grad():
        assert torch.equal(again.denoiser(x, t, s=s), net(x, t, s=s))
    assert set(examples(again, 2)) == {"z", "prompt"}
    for export in (to_diffusers, to_comfyui):
        with pytest.raises(
            ValueError, match=r"has further inputs \(s\), which differ between its 2 calls"
        ):
            export(tmp_path / "student", tmp_path / "out")
