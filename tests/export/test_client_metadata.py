"""What clients read of a file is what the student is: read back with safetensors, PIL and YAML."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.linear_solver import LinearSolver
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import Flow, NoisePath
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Sampler
from fewstep.export.client_metadata import (
    PROMPT,
    UNKNOWN,
    VERSIONS,
    Example,
    architecture,
    description,
    example,
    first_prompt,
    hint,
    kohya_keys,
    save_tensors,
)
from fewstep.export.formats import export
from fewstep.export.model_card import card
from fewstep.storage.files import write_json
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.teachers.diffusers.scheduler_config import Timesteps
from tests.conftest import Folders

UNET = "UNet2DConditionModel"
SD = {"block_out_channels": [320, 640, 1280, 1280]}
XL = {"block_out_channels": [320, 640, 1280]}
SD3 = {"num_layers": 24, "num_attention_heads": 24}
LARGE = {"num_layers": 38, "num_attention_heads": 38}
FLUX = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}
QWEN = {"num_layers": 60, "num_attention_heads": 24}
NAMES: list[tuple[str, dict[str, Any], str, str]] = [
    (UNET, {**SD, "cross_attention_dim": 768}, "eps", "stable-diffusion-v1"),
    (UNET, {**SD, "cross_attention_dim": 1024}, "eps", "stable-diffusion-v2-512"),
    (UNET, {**SD, "cross_attention_dim": 1024}, "v", "stable-diffusion-v2-768-v"),
    (UNET, {**XL, "cross_attention_dim": 2048}, "eps", "stable-diffusion-xl-v1-base"),
    (UNET, {**XL, "cross_attention_dim": 768}, "eps", "AnyPipeline"),
    ("SD3Transformer2DModel", SD3, "velocity", "stable-diffusion-3-medium"),
    (
        "SD3Transformer2DModel",
        {**SD3, "dual_attention_layers": [0, 1]},
        "velocity",
        "stable-diffusion-3-5-medium",
    ),
    ("SD3Transformer2DModel", LARGE, "velocity", "stable-diffusion-3-5-large"),
    ("FluxTransformer2DModel", {**FLUX, "guidance_embeds": True}, "velocity", "flux-1-dev"),
    ("FluxTransformer2DModel", {**FLUX, "guidance_embeds": False}, "velocity", "flux-1-schnell"),
    ("QwenImageTransformer2DModel", QWEN, "velocity", "Qwen-Image"),
    ("SanaTransformer2DModel", QWEN, "velocity", "AnyPipeline"),
]


@pytest.mark.parametrize(("kind", "config", "predicts", "name"), NAMES, ids=lambda v: str(v)[:40])
def test_architectures_have_the_names_that_trainers_write(
    kind: str, config: dict[str, Any], predicts: Any, name: str
) -> None:
    model = Model(DiffusersNet(kind, json.dumps(config), 77, 512), (4, 8, 8), predicts=predicts)
    student = Generator(None, FewStep(999.0), (4, 8, 8), model=model)
    assert architecture(student, "AnyPipeline") == name
    keys = kohya_keys(student, "AnyPipeline", Path("fast.safetensors"))
    assert keys["ss_output_name"] == "fast"
    assert keys.get("ss_base_model_version") == VERSIONS.get(name)
    assert keys["ss_v2"] == str("v2" in name)


def of(sampler: Sampler, path: NoisePath = Timesteps(), **call: float) -> Generator:
    """A student whose network is nothing."""
    denoiser = SimpleNamespace(path=path, net=SimpleNamespace(call=call))
    return Generator(denoiser, sampler, (4, 8, 8), card={"method": "SiD(alpha=1.0)"})


HINTS = [
    (of(FewStep(999.0, 4, unit=True)), "4 steps, cfg 1, LCM"),
    (of(FewStep(625.0)), "1 step, cfg 1, Euler, from t = 625 of 999"),
    (of(FewStep(999.0, 2, noise="ddim", unit=True)), "2 steps, cfg 1, DDIM"),
    (of(FewStep(1.0, 4), Flow()), "4 steps, cfg 1, LCM"),
    (of(FewStep(1.0, 2, noise="ddim"), Flow()), "2 steps, cfg 1, Euler"),
    (of(FewStep(1.0), Flow(), guidance_scale=3.5), "1 step, cfg 1, guidance 3.5, Euler"),
    (of(FewStep(1.0, 2, noise="fixed"), Flow()), "2 steps, cfg 1, sampler FewStep of fewstep"),
    (of(CFG(FewStep(1.0), 4.0), Flow()), "1 step, cfg 4, Euler"),
    (of(FewStep(times=(1.0, 0.7)), Flow()), "2 steps, cfg 1, LCM, at t = 1, 0.7"),
    (
        of(LinearSolver(times=(1.0, 0.5)), Flow()),
        "2 steps, cfg 1, sampler LinearSolver of fewstep",
    ),
]


@pytest.mark.parametrize(("student", "told"), HINTS, ids=[told for _, told in HINTS])
def test_the_hint_says_steps_guidance_and_sampler(student: Generator, told: str) -> None:
    assert hint(student) == told
    assert description(student) == (
        f"Distilled from a teacher trained by fewstep by SiD with fewstep. Use it with {told}."
    )


def test_the_digest_is_that_of_the_tensors(tmp_path: Path) -> None:
    """Of all but the header, as the specification has it; another weight has another."""
    state = {"b": torch.randn(3, 5), "a": torch.arange(4).half()}
    found = []
    for weights in (state, {**state, "b": state["b"] + 1}):
        path = tmp_path / "a.safetensors"
        save_tensors(path, weights, {"card": UNKNOWN, "name": os.fsdecode(b"r\xe9n")})
        assert list(tmp_path.iterdir()) == [path]
        (tmp_path / "plain").touch()
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
        (tmp_path / "plain").unlink()
        data = path.read_bytes()
        header = int.from_bytes(data[:8], "little")
        told = json.loads(data[8 : 8 + header])["__metadata__"]
        assert (told["card"], told["name"]) == (UNKNOWN, "r\ufffdn")
        digest = hashlib.sha256(data[8 + header :]).hexdigest()
        assert told["modelspec.hash_sha256"] == f"0x{digest}"
        assert all(torch.equal(tensor, weights[name]) for name, tensor in load(data).items())
        found.append(digest)
    assert found[0] != found[1]


def test_the_thumbnail_is_the_picture_made_small() -> None:
    wide = Image.new("RGB", (1024, 512), (200, 40, 90))
    kind, _, data = Example(wide).thumbnail().partition(";base64,")
    assert kind == "data:image/jpeg"
    small = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (small.format, small.size) == ("JPEG", (256, 128))
    assert np.abs(np.asarray(small, float).mean((0, 1)) - (200, 40, 90)).max() < 3
    assert Image.open(io.BytesIO(Example(wide).png())).getpixel((5, 5)) == (200, 40, 90)


def front(text: str) -> dict[str, Any]:
    """The front matter of a card."""
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_the_card_of_a_hub_model_can_be_looked_up(tmp_path: Path) -> None:
    """`base_model` is ORG/NAME or nothing; prompts are quoted as YAML wants them."""
    hub = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    hub.mkdir(parents=True)
    pipeline = "StableDiffusionXLPipeline"
    student = of(FewStep(999.0, 4, unit=True))
    student = replace(student, card={"teacher": {"folder": str(hub), "pipeline": pipeline}})
    prompt = 'a "red" cube: #1\u00e9'
    given = {"library_name": "diffusers", "base_model_relation": "adapter"}
    text = card(student, tmp_path, "", {}, given, (prompt, "picture.png"))
    head = front(text)
    assert head["base_model"] == "org/name"
    assert head["base_model_relation"] == "adapter"
    assert head["widget"] == [{"text": prompt, "output": {"url": "picture.png"}}]
    known = ["text-to-image", "diffusers", "stable-diffusion-xl", "lora", "template:sd-lora"]
    assert head["tags"] == [*known, "few-step", "distillation"]
    assert "\n# org/name in 4 steps\n\n<Gallery />\n" in text
    here = {"teacher": {"folder": str(tmp_path), "pipeline": "Other"}}
    text = card(replace(student, card=here), tmp_path, "", {}, None, ("", "a b.png"))
    head = front(text)
    assert "base_model" not in head
    assert "widget" not in head
    assert head["tags"] == ["text-to-image", "few-step", "distillation"]
    assert "![samples](a%20b.png)" in text


def test_the_first_prompt_is_of_the_run(tmp_path: Path) -> None:
    file, run = tmp_path / "mine.txt", tmp_path / "run"
    file.write_text("\na cube, blue\na ball\n")
    (run / "best").mkdir(parents=True)
    assert first_prompt(run) == PROMPT
    domain = {"type": "Prompts", "file": str(file)}
    write_json(run / "run.json", {"run": {"domain": domain}})
    assert [first_prompt(home) for home in (run, run / "best")] == ["a cube, blue"] * 2
    file.unlink()
    assert first_prompt(run) == PROMPT


def test_of_a_student_without_prompts_sixteen_samples_are_shown(finished: Path) -> None:
    from fewstep.data.image_grid import grid

    run = finished / "runs" / "sid"
    student = load_student(run)
    shown = example(student, run)
    assert shown.prompt == ""
    assert shown.picture.tobytes() == grid(student.sample(range(16))).tobytes()
    assert shown.picture.tobytes() != grid(student.sample(range(1, 17))).tobytes()


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


@pytest.mark.slow
def test_every_file_of_a_pipeline_says_what_it_is(folders: Folders, tmp_path: Path) -> None:
    """Adapter for diffusers and kohya's, the network alone, ComfyUI's: keys, sidecar, picture."""
    pytest.importorskip("peft")
    from fewstep.diffusion.pixels import to_uint8
    from fewstep.export.comfyui import sigma_table
    from fewstep.teachers.diffusers.load import with_text_and_vae
    from tests.export.test_lora import adapted

    made = adapted(folders("sd"), tmp_path / "student", "sd")
    export(made, tmp_path / "lora", "lora")
    export(made, tmp_path / "kohya.safetensors", "kohya")
    export(made, tmp_path / "net.safetensors", "safetensors")
    export(made, tmp_path / "comfy", "comfyui")
    files = {
        "lora": tmp_path / "lora" / "pytorch_lora_weights.safetensors",
        "kohya": tmp_path / "kohya.safetensors",
        "net": tmp_path / "net.safetensors",
        "comfy": tmp_path / "comfy" / "diffusion_models" / "comfy.safetensors",
    }
    student = with_text_and_vae(load_student(made))
    assert student.text is not None
    drawn = to_uint8(student.sample([0], cond=student.text([PROMPT])))[0].numpy()
    told = "1 step, cfg 1, Euler, from t = 625 of 999"
    for name, file in files.items():
        found = header(file)
        adapter = "/lora" if name in ("lora", "kohya") else ""
        data = file.read_bytes()
        rest = data[8 + int.from_bytes(data[:8], "little") :]
        expected = {
            "sai_model_spec": "1.0.1",
            "architecture": f"StableDiffusionPipeline{adapter}",
            "implementation": "diffusers",
            "title": f"{folders('sd').name} in 1 step",
            "resolution": "16x16",
            "usage_hint": told,
            "prediction_type": "epsilon",
            "tags": "few-step, distillation",
            "hash_sha256": f"0x{hashlib.sha256(rest).hexdigest()}",
        }
        assert {key: found[f"modelspec.{key}"] for key in expected} == expected, name
        assert "modelspec.license" not in found  # which this teacher does not state
        assert found["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
        if adapter:
            stem = {"lora": "lora", "kohya": "kohya"}[name]
            assert (found["ss_output_name"], found["ss_v2"]) == (stem, "False")
        shown = tmp_path / "lora" / "picture.png" if name == "lora" else file.with_suffix(".png")
        assert np.abs(np.asarray(Image.open(shown), int) - drawn).max() <= 1, name
        if name != "lora":
            beside = json.loads(file.with_suffix(".json").read_text())
            assert (beside["notes"], beside["sd version"]) == (told, "Unknown")
    cards = {
        "lora": (tmp_path / "lora" / "README.md", "picture.png"),
        "kohya": (tmp_path / "kohya.safetensors.md", "kohya.png"),
        "net": (tmp_path / "net.safetensors.md", "net.png"),
        "comfy": (tmp_path / "comfy" / "README.md", "diffusion_models/comfy.png"),
    }
    for name, (file, url) in cards.items():
        head = front(file.read_text())
        assert head["widget"] == [{"text": PROMPT, "output": {"url": url}}], name
        assert (file.parent / url).is_file()
        assert ("lora" in head["tags"]) == (name in ("lora", "kohya"))
    sigma = float(sigma_table()[625])
    row = f"| sigmas | {sigma:.9f}, 0.000000000, for ManualSigmas of ComfyUI |"
    assert row in cards["kohya"][0].read_text()
