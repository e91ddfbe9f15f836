"""Workflows for ComfyUI: their own numbers, followed as ComfyUI does, give the student's latents.

The arithmetic of `follow` is ComfyUI's (sigma-space, its table of sigmas, argmin timesteps), not
that of `FewStep`; only how a network is called is shared. Negative controls: steps of another
ladder, a deterministic sampler in place of fresh noise, and unit noise where sigma z is meant.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path

import pytest
import torch

from tests.conftest import Folders

pytest.importorskip("diffusers")

from safetensors.torch import load_file

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VP
from fewstep.diffusion.samplers import FewStep, MultiStep
from fewstep.diffusion.time_distributions import Whole
from fewstep.diffusion.types import Sampler
from fewstep.export.comfyui import (
    NUMBER,
    caution,
    check_workflow,
    sigma_table,
    t5_tokens,
    to_comfyui,
    without_t5,
    workflow,
    workflow_difference,
)
from fewstep.export.diffusers_pipeline import to_diffusers
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.folder import open_folder
from fewstep.teachers.diffusers.load import load_pipeline
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.teachers.diffusers.scheduler_config import Timesteps
from tests.command import fewstep
from tests.export.test_diffusers_pipeline import ran, student

CASES = {
    "sd": (FewStep(625.0), FewStep(999.0, unit=True), FewStep(625.0, 3)),
    "sd_v": (FewStep(999.0, 4, unit=True), FewStep(999.0, 4, "ddim", unit=True)),
    "sdxl": (FewStep(399.0), FewStep(999.0, 4, rho=1.5, unit=True)),
    "sd3": (FewStep(1.0), FewStep(1.0, 4), FewStep(1.0, 2, "ddim"), FewStep(0.9, 2)),
}


@pytest.mark.parametrize(
    ("kind", "sampler"), [(k, s) for k, samplers in CASES.items() for s in samplers], ids=str
)
def test_a_workflow_makes_what_the_student_makes(
    folders: Folders, tmp_path: Path, kind: str, sampler: FewStep
) -> None:
    made = load_student(student(folders(kind), tmp_path / "student", sampler))
    nodes = workflow(made, "fast.safetensors", "base.safetensors")
    assert workflow_difference(nodes, made) <= 1e-5
    for node in nodes.values():
        if node["class_type"] == "ManualSigmas":
            sigmas = [float(s) for s in NUMBER.findall(node["inputs"]["sigmas"])]
            assert len(sigmas) == sampler.steps + 1
            assert sigmas[-1] == 0
            node["inputs"]["sigmas"] = ", ".join(str(0.5 * s) for s in sigmas)
    assert workflow_difference(nodes, made) > 1e-3


def test_another_sampler_is_noticed(folders: Folders, tmp_path: Path) -> None:
    made = load_student(student(folders("sd"), tmp_path / "student", FewStep(625.0, 3)))
    nodes = workflow(made, "fast.safetensors", "base.safetensors")
    (chosen,) = (n["inputs"] for n in nodes.values() if n["class_type"] == "KSamplerSelect")
    assert chosen["sampler_name"] == "lcm"
    chosen["sampler_name"] = "euler"
    assert workflow_difference(nodes, made) > 1e-2


def test_the_table_is_the_path() -> None:
    path, t = Timesteps(), torch.arange(1000, dtype=torch.float64)
    assert torch.allclose(sigma_table().double(), path.sigma(t) / path.alpha(t), rtol=1e-6)
    assert abs(float(sigma_table()[-1]) - 14.614642) < 1e-5  # what ComfyUI calls its largest sigma
    assert abs(float(sigma_table()[0]) - 0.0291675) < 1e-6


def test_the_folder(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = student(folders("sd_v"), tmp_path / "student", FewStep(625.0))
    assert to_comfyui(made, tmp_path / "fast") <= 1e-5
    nodes = json.loads((tmp_path / "fast" / "workflow.json").read_text())
    check_workflow(nodes)
    given = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert given["UNETLoader"]["unet_name"] == "fast.safetensors"
    assert given["ModelSamplingDiscrete"]["sampling"] == "v_prediction"
    assert given["EmptyLatentImage"] == {"width": 16, "height": 16, "batch_size": 1}
    state = load_file(tmp_path / "fast" / "diffusion_models" / "fast.safetensors")
    assert state.keys() == load_pipeline(folders("sd_v")).denoiser.net.net.state_dict().keys()
    text = (tmp_path / "fast" / "README.md").read_text()
    assert f"| sigmas | {float(sigma_table()[625]):.9f}, 0.000000000 |" in text
    assert "| caution | ComfyUI's UNETLoader tells a network by the published sizes" in text
    asked: list[tuple[str, bytes]] = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda *told: asked.append(told))
    ran(text, tmp_path)
    assert json.loads(asked[0][1]) == {"prompt": nodes}
    assert f"come from {given['CheckpointLoaderSimple']['ckpt_name']} in" in text
    wrong = json.loads(json.dumps(nodes))
    next(n for n in wrong.values() if n["class_type"] == "VAEDecode")["inputs"]["vae"][1] = 1
    with pytest.raises(ValueError, match="vae is not of type VAE"):
        check_workflow(wrong)


def test_an_adapter_is_loaded_on_the_checkpoint(folders: Folders, tmp_path: Path) -> None:
    """Nothing else of the workflow differs, and so the same numbers are followed."""
    made = load_student(student(folders("sd"), tmp_path / "student", FewStep(625.0, 3)))
    whole = workflow(made, "fast.safetensors", "base.safetensors")
    nodes = workflow(made, "fast.safetensors", "base.safetensors", adapter=True)
    kinds = [node["class_type"] for node in nodes.values()]
    assert "UNETLoader" not in kinds
    (rest,) = (key for key, n in nodes.items() if n["class_type"] == "CheckpointLoaderSimple")
    (own,) = (key for key, n in nodes.items() if n["class_type"] == "LoraLoaderModelOnly")
    assert nodes[own]["inputs"] == {
        "model": [rest, 0],
        "lora_name": "fast.safetensors",
        "strength_model": 1.0,
    }
    assert {key: n for key, n in nodes.items() if key != own} == {
        key: n for key, n in whole.items() if key != own
    }
    assert workflow_difference(nodes, made) == workflow_difference(whole, made) <= 1e-5


def test_t5_hears_as_many_tokens_as_the_student(folders: Folders, tmp_path: Path) -> None:
    """256, of which ComfyUI by itself would fill up 77; a pipeline without T5 has no such node."""
    made = student(folders("sd3"), tmp_path / "student", FewStep(1.0))
    to_comfyui(made, tmp_path / "fast")
    nodes = json.loads((tmp_path / "fast" / "workflow.json").read_text())
    given = {node["class_type"]: node["inputs"] for node in nodes.values()}
    link = given["CLIPTextEncode"]["clip"]
    assert nodes[link[0]]["class_type"] == "T5TokenizerOptions"
    options = nodes[link[0]]["inputs"]
    assert (options["min_padding"], options["min_length"]) == (0, 256)
    assert nodes[options["clip"][0]]["class_type"] == "CheckpointLoaderSimple"
    text = load_pipeline(folders("sd3")).text
    assert text is not None
    assert text(["a"])["prompt"].shape[1] == 8 + 256  # type: ignore[index, call-overload]
    plain = workflow(load_student(made), "a.safetensors", "b.safetensors")
    assert "T5TokenizerOptions" not in [node["class_type"] for node in plain.values()]
    assert t5_tokens(open_folder(folders("sd"))) == 0


def test_an_sd3_without_t5_is_told(folders: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "sd3"
    shutil.copytree(folders("sd3"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {key: [None, None] for key in ("text_encoder_3", "tokenizer_3")}
    (folder / "model_index.json").write_text(json.dumps(index))
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
    assert t5_tokens(open_folder(folder)) == 0
    assert "ComfyUI has none" in without_t5(open_folder(folder))
    assert without_t5(open_folder(folders("sd3"))) == without_t5(open_folder(folders("sd"))) == ""
    made = student(folder, tmp_path / "student", FewStep(1.0))
    done = fewstep("export", str(made), str(tmp_path / "fast"), "--to", "comfyui")
    assert done.code == 0, done.err
    for text in (done.err, (tmp_path / "fast" / "README.md").read_text()):
        assert without_t5(open_folder(folder)) in text


SIZES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "UNet2DConditionModel": (
        {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768},
        {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 2048},
    ),
    "SD3Transformer2DModel": (
        {"num_layers": 38, "num_attention_heads": 38},
        {"num_layers": 24, "num_attention_heads": 38},
    ),
}


@pytest.mark.parametrize("kind", SIZES)
def test_sizes_that_are_not_published_are_told(kind: str) -> None:
    """Sizes of two models together are those of none."""
    said = [
        caution(
            Model(DiffusersNet(kind, json.dumps({**sizes, "dropout": 0}), 77, 512), (4, 64, 64))
        )
        for sizes in SIZES[kind]
    ]
    assert said[0] == ""
    assert all(f"{key} {size}" in said[1] for key, size in SIZES[kind][1].items())


def test_an_sd3_of_as_many_blocks_as_heads_is_loaded() -> None:
    """As one of 12 was; heads of 64 channels, as all published have."""
    sizes = {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64}
    for more in ({}, {"num_layers": 11}, {"attention_head_dim": 32}):
        config = json.dumps({**sizes, **more})
        model = Model(DiffusersNet("SD3Transformer2DModel", config, 77, 512), (16, 64, 64))
        assert (caution(model) == "") == (more == {})


def test_the_command_tells_them(folders: Folders, tmp_path: Path) -> None:
    made = student(folders("sd"), tmp_path / "student", FewStep(625.0))
    for to, told in (("comfyui", True), ("diffusers", False)):
        done = fewstep("export", str(made), str(tmp_path / to), "--to", to)
        assert done.code == 0, done.err
        assert ("this one has others (block_out_channels [8, 16]" in done.err) == told


def test_what_stock_nodes_cannot_do_is_refused(folders: Folders, tmp_path: Path) -> None:
    def of(kind: str, sampler: Sampler) -> Path:
        return student(folders(kind), tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}", sampler)

    with pytest.raises(ValueError, match="reads no network of a SanaPipeline"):
        to_comfyui(of("sana", FewStep(1.0)), tmp_path / "out")
    for sampler in (CFG(FewStep(625.0)), MultiStep(Whole(0, 999), 4, "dpm++")):
        for export in (to_comfyui, to_diffusers):
            message = r"follow[s]?; --to pt2 and --to onnx write any student with its sampler$"
            with pytest.raises(ValueError, match=message):
                export(of("sd", sampler), tmp_path / "out")
    with pytest.raises(ValueError, match=r"repeats the same noise, .*; --to pt2 and --to onnx"):
        to_comfyui(of("sd", FewStep(999.0, 4, "fixed")), tmp_path / "out")
    for early in (FewStep(625.0, unit=True), FewStep(999.0)):
        with pytest.raises(ValueError, match="unit noise at 999 and with sigma z below"):
            to_comfyui(of("sd", early), tmp_path / "out")
    made = load_student(of("sd", FewStep(625.0)))
    object.__setattr__(made.denoiser.path, "beta_end", 0.02)
    assert isinstance(made.denoiser.path, VP)
    with pytest.raises(ValueError, match="ComfyUI has betas of its own"):
        workflow(made, "a.safetensors", "b.safetensors")
    assert not (tmp_path / "out").exists()
