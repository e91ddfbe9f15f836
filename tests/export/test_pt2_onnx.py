"""Students as torch.export and ONNX programs: what they compute is what the student computes.

Negative controls: another student's numbers, and a graph that would differ, are noticed.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.image_grid import grid
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun, Jumps, MultiStep
from fewstep.diffusion.time_distributions import Karras
from fewstep.diffusion.types import Cond, Denoiser, Sampler, State
from fewstep.export import pt2_onnx
from fewstep.export.formats import export
from fewstep.export.model_card import card
from fewstep.export.pt2_onnx import to_onnx, to_pt2
from fewstep.export.traced_generator import Program, batches, difference, examples, traced
from fewstep.nets.mlp import MLP
from fewstep.nets.patch_unet import PatchUNet
from fewstep.storage.model_folder import load_student, save_model
from fewstep.teachers.network_config import describe
from tests.command import fewstep

SMALL = {
    **{"img_resolution": 8, "img_channels": 3, "label_dim": 4, "model_channels": 8},
    **{"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]},
}
TINY = Model(MLP(16, 1), (1, 8, 8), 10)
STUDENTS: dict[str, Callable[[], tuple[Model, Sampler]]] = {
    "four calls, fresh noise": lambda: (Model(MLP(16, 1), (1, 8, 8), 10), FewStep(2.5, 4)),
    "patches": lambda: (Model(PatchUNet(8), (1, 8, 8)), FewStep(2.5, 2, "fixed")),
    "EDM": lambda: (describe("EDMPrecond", {**SMALL, "model_type": "SongUNet"})[0], FewStep(2.5)),
    "EDM2": lambda: (describe("Precond", {**SMALL, "channels_per_head": 8})[0], FewStep(2.5)),
    "chosen times": lambda: (TINY, FewStep(noise="ddim", times=(80.0, 2.0, 0.5))),
    "a flow map": lambda: (replace(TINY, inputs=("s",)), Jumps(2.5, 3)),
    "DDIM": lambda: (TINY, Heun(Karras(0.02, 5), 4, 1)),
    "Heun": lambda: (TINY, Heun(Karras(0.02, 5), 3)),
    "DPM-Solver++": lambda: (TINY, MultiStep(Karras(0.02, 5), 4, "dpm++")),
    "UniPC": lambda: (TINY, MultiStep(Karras(0.02, 5), 5, "unipc", 3)),
    "guided": lambda: (TINY, CFG(FewStep(2.5, 2), 2.0)),
}

FAST = ("four calls, fresh noise", "patches", "a flow map")


def generator(model: Model, sampler: Sampler) -> Generator:
    """With no weight left at zero."""
    net = model.build()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for p in net.parameters():
            if not bool(p.any()):
                p.normal_(std=0.1)
    return Generator(net.requires_grad_(False).eval(), sampler, model.shape, model.classes, model)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in STUDENTS],
)
def test_a_graph_computes_what_the_student_does(name: str) -> None:
    """For one sample and for three, where two were traced."""
    student = generator(*STUDENTS[name]())
    graph = traced(student)
    assert batches(graph) is None
    assert difference(student, graph.module()) <= 1e-6
    other = deepcopy(student)
    for p in other.denoiser.parameters():
        p.data += 0.01
    assert difference(other, graph.module(), (1,)) > 1e-3


@pytest.mark.parametrize(
    "name",
    ["a flow map", *(pytest.param(name, marks=pytest.mark.slow) for name in ("guided", "UniPC"))],
)
def test_a_stored_program_is_what_sample_makes(name: str, tmp_path: Path) -> None:
    """`Generator.sample`, which `fewstep sample` calls, and not the samples of one call fewer."""
    student = generator(*STUDENTS[name]())
    assert student.model is not None
    state = student.denoiser.state_dict()
    save_model(tmp_path / "model", state, student.model, student.sampler, {})
    assert to_pt2(tmp_path / "model", tmp_path / "it.pt2") <= 1e-5
    again = torch.export.load(tmp_path / "it.pt2").module()
    draws = Draws(torch.arange(3), 0, "sample/")
    inputs = {"z": draws.normal("z", student.shape), "label": torch.arange(3)}
    if name == "guided":
        inputs["noise"] = draws.normal("eps1", student.shape)[:, None]
    x = load_student(tmp_path / "model").sample(range(3))
    assert (again(inputs) - x).abs().max() <= 1e-5 * x.abs().max()
    inner = student.sampler.sampler if isinstance(student.sampler, CFG) else student.sampler
    assert isinstance(inner, FewStep | Jumps | MultiStep)
    fewer = replace(student, sampler=replace(inner, steps=inner.steps - 1)).sample(range(3))
    assert (fewer - x).abs().max() > 1e-3 * x.abs().max()


def test_the_card_says_how_it_is_sampled(tmp_path: Path) -> None:
    """Calls and their times, whatever the sampler; guidance that is part of it."""
    rows = {}
    for name in ("chosen times", "a flow map", "Heun", "guided"):
        text = card(generator(*STUDENTS[name]()), tmp_path, "", {})
        rows[name] = [
            line for line in text.splitlines() if line.startswith(("# ", "| st", "| gu"))
        ]
    z = "standard normal z of [1, 8, 8], which is multiplied by"
    weights = "| guidance | none at sampling: it is in the weights |"
    assert rows["chosen times"] == [
        "# a teacher trained by fewstep in 3 steps",
        "| steps | 3, at t = 80, 2, 0.5 of VE |",
        f"| starts from | {z} 80 |",
        weights,
    ]
    assert rows["a flow map"][1] == "| steps | 3, at t = 2.5, 1.66667, 0.833333 of VE |"
    middle = Karras(0.02, 5).quantile(torch.tensor(0.5, dtype=torch.float64))
    ladder = f"5, {middle:g}, {middle:g}, 0.02, 0.02"
    assert rows["Heun"][1] == f"| steps | 5, at t = {ladder} of VE |"
    assert rows["guided"][0] == "# a teacher trained by fewstep in 2 steps"
    assert rows["guided"][3] == ("| guidance | at scale 2, part of the sampler: 4 network calls |")


@dataclass(frozen=True)
class Jittered(FewStep):
    """Draws a number that is no normal noise."""

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        assert draws is not None
        draws.uniform("time")
        yield from super().states(denoiser, z, cond, draws)


def test_the_program_is_the_sampler() -> None:
    """One step is f(sigma z; sigma); one sample's noise is its own."""
    student = generator(*STUDENTS["EDM"]())
    inputs = examples(student, 2)
    x = student.denoiser(2.5 * inputs["z"], torch.tensor(2.5), inputs["label"])
    assert torch.equal(Program(student)(inputs), x)
    many = generator(*STUDENTS["four calls, fresh noise"]())
    inputs = examples(many, 3)
    assert inputs["noise"].shape == (3, 3, 1, 8, 8)
    whole, last = Program(many)(inputs), Program(many)({k: v[2:] for k, v in inputs.items()})
    assert torch.allclose(whole[2:], last, atol=1e-6)


ALONE = """
import json, sys, torch
file, z, out = sys.argv[1:]
extra = {"fewstep.json": ""}
generator = torch.export.load(file, extra_files=extra).module()
facts = json.loads(extra["fewstep.json"])
x = generator({"z": torch.load(z, weights_only=True), "label": torch.arange(4)})
assert not any(name.startswith("fewstep") for name in sys.modules)
torch.save([x, facts["inputs"]["z"]["shape"], facts["classes"]], out)
"""


@pytest.mark.slow
def test_digits_in_another_process(finished: Path, tmp_path: Path) -> None:
    """With torch alone: the pictures that `fewstep sample` makes, and what the file says."""
    home = finished / "runs" / "sid"
    done = fewstep("export", str(home), str(tmp_path / "sid.pt2"), "--to", "pt2")
    assert done.code == 0, done.err
    z = Draws(torch.arange(4), 0, "sample/").normal("z", (1, 8, 8))
    torch.save(z, tmp_path / "z.pt")
    args = [sys.executable, "-c", ALONE, tmp_path / "sid.pt2", tmp_path / "z.pt", tmp_path / "x"]
    subprocess.run(list(map(str, args)), check=True, capture_output=True, cwd=tmp_path)
    x, shape, classes = torch.load(tmp_path / "x", weights_only=True)
    assert (x - load_student(home).sample(range(4))).abs().max() < 1e-5
    assert (shape, classes) == (["B", 1, 8, 8], 10)
    text = (tmp_path / "sid.pt2.md").read_text()
    assert "| steps | 1, at t = 2.5 of VE |" in text
    assert "standard normal z of [1, 8, 8], which is multiplied by 2.5" in text
    assert "| output | x_0 of shape [B, 1, 8, 8] |" in text
    names: dict[str, object] = {}
    code = text.split("```python\n")[1].split("```")[0].replace("sid.pt2", f"{tmp_path}/sid.pt2")
    exec(code, names)
    assert names["x"].shape == (1, 1, 8, 8)  # type: ignore[attr-defined]


def test_onnx(finished: Path, tmp_path: Path) -> None:
    """By onnxruntime, with its metadata."""
    runtime = pytest.importorskip("onnxruntime")
    home = finished / "runs" / "sid"
    assert to_onnx(home, tmp_path / "sid.onnx") < 1e-5
    session = runtime.InferenceSession(tmp_path / "sid.onnx")
    z = Draws(torch.arange(4), 0, "sample/").normal("z", (1, 8, 8))
    (x,) = session.run(["x"], {"z": z.numpy(), "label": torch.arange(4).numpy()})
    assert abs(x - load_student(home).sample(range(4)).numpy()).max() < 1e-5
    told = json.loads(session.get_modelmeta().custom_metadata_map["fewstep"])
    assert (told["opset"], told["sampler"]) == (20, repr(FewStep(2.5)))
    text = (tmp_path / "sid.onnx.md").read_text()
    names: dict[str, Any] = {}
    with contextlib.chdir(tmp_path):
        exec(text.split("```python\n")[1].split("```")[0], names)
    found = names["x"]
    assert found.shape == (1, 1, 8, 8)
    drawn = np.asarray(Image.open(tmp_path / "picture.png"), int)
    assert abs(drawn - ((found[0, 0] + 1) * 127.5).clip(0, 255)).max() <= 0.5
    assert drawn.std() > 10
    assert "\n![samples](sid.onnx.png)\n" in text
    shown = Image.open(tmp_path / "sid.onnx.png").tobytes()
    assert shown == grid(load_student(home).sample(range(16))).tobytes()


class Squeezed(torch.nn.Module):
    """One squeeze that does something, and one of a dimension of 3, that does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(1) * 2 + x.sum(1).squeeze(1)


def test_only_idle_squeezes_are_taken_out() -> None:
    """ONNX has no squeeze of a dimension that is not 1."""
    x = torch.arange(6.0).reshape(2, 1, 3)
    program = torch.export.export(Squeezed(), (x,))
    before = program.module()(x)

    def squeezes() -> int:
        idle = torch.ops.aten.squeeze.dim
        return sum(node.target is idle for node in program.graph.nodes)

    assert squeezes() == 2
    pt2_onnx._without_idle_squeezes(program)
    assert squeezes() == 1
    assert torch.equal(program.module()(x), before)
    assert torch.equal(before, 2 * x[:, 0] + x[:, 0])


def test_onnx_says_what_it_needs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[onnx\]'"):
        to_onnx(finished / "runs" / "sid", tmp_path / "sid.onnx")


def test_what_differs_is_not_kept(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pt2_onnx, "difference", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="nothing was written"):
        to_pt2(finished / "runs" / "sid", tmp_path / "sid.pt2")
    assert not list(tmp_path.iterdir())


def test_refusals(finished: Path, tmp_path: Path) -> None:
    home = finished / "runs" / "sid"
    with pytest.raises(ValueError, match=r"should be a new file that ends in .pt2"):
        export(home, tmp_path / "sid.pt", "pt2")
    (tmp_path / "sid.pt2").touch()
    with pytest.raises(ValueError, match=r"should be a new file that ends in .pt2"):
        export(home, tmp_path / "sid.pt2", "pt2")
    (tmp_path / "other.pt2.md").touch()
    with pytest.raises(ValueError, match=r"other.pt2.md exists already; move it away"):
        export(home, tmp_path / "other.pt2", "pt2")
    with pytest.raises(ValueError, match="there is no folder"):
        export(home, tmp_path / "no" / "sid.pt2", "pt2")
    with pytest.raises(ValueError, match="there is no format 'onx'; did you mean 'onnx'"):
        export(home, tmp_path / "x", "onx")
    with pytest.raises(ValueError, match="has no VAE to decode with: leave out --pictures"):
        export(home, tmp_path / "new.pt2", "pt2", pictures=True)
    with pytest.raises(ValueError, match="--pictures is for pt2 and onnx, not for 'diffusers'"):
        export(home, tmp_path / "new", "diffusers", pictures=True)
    with pytest.raises(ValueError, match="draws other numbers than normal noise, for 'time'"):
        traced(generator(TINY, Jittered(2.5)))
    with pytest.raises(
        ValueError, match=r"not distilled from a pipeline.*pt2 and --to onnx write"
    ):
        export(home, tmp_path / "new", "diffusers")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text((home / "run.json").read_text())
    with pytest.raises(ValueError, match="is not finished; continue it with: fewstep distill"):
        export(tmp_path / "half", tmp_path / "x", "pt2")
    assert {path.name for path in tmp_path.iterdir()} == {"sid.pt2", "other.pt2.md", "half"}
