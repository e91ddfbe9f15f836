"""Adapters as files: loaded by stock diffusers they are the student, and by SVD its nearest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Folders

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from fewstep.config import encode
from fewstep.diffusion.extra_inputs import ExtraInputs
from fewstep.diffusion.samplers import FewStep, Jumps
from fewstep.export import lora as module
from fewstep.export.comfyui import check_workflow, sigmas
from fewstep.export.diffusers_pipeline import against
from fewstep.export.formats import export
from fewstep.export.lora import FILE, factored, parts, to_kohya, to_lora, verified
from fewstep.nets.lora import LoRA, pairs
from fewstep.storage.model_folder import load_student, save_model
from fewstep.teachers.diffusers.adapter_base import adapter_of
from fewstep.teachers.diffusers.load import load_pipeline
from tests.command import fewstep
from tests.export.test_diffusers_pipeline import ran

pytestmark = pytest.mark.slow

SAMPLERS = {
    "sd": FewStep(625.0),
    "sdxl": FewStep(999.0, 4, unit=True),
    "sd3": FewStep(1.0, 4),
    "sana": FewStep(1.0),
    "flux": FewStep(1.0, 2),
    "pixart": FewStep(399.0, unit=True),
    **dict.fromkeys(("sd35", "flux2", "qwen_image", "z_image"), FewStep(1.0, 2)),
}
BLOCKS = ("net.net.down_blocks", "net.net.mid_block", "net.net.up_blocks", "net.net.transformer_b")


def noise(seed: int = 0) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda like: 0.1 * torch.randn(like.shape, generator=generator)


def adapted(
    folder: Path, home: Path, kind: str, sampler: FewStep | None = None, **more: Any
) -> Path:
    """A student with adapters of rank 3 that were trained, in place of training, by noise."""
    teacher, lora, some = load_pipeline(folder), LoRA(3, alpha=1.5), noise()
    role = lora.adapt(teacher.denoiser)
    for p in role.parameters():
        p.data += some(p)
    adapters, base = role.state_dict(), teacher.denoiser.state_dict()
    card = {"teacher": dict(teacher.card), "lora": encode(lora), **more}
    whole = lora.merged(base, adapters)
    save_model(home, whole, teacher.model, sampler or SAMPLERS[kind], card, adapters)
    return home


def whole(folder: Path, home: Path, kind: str, every: bool = False) -> Path:
    """A student all of whose linear layers and convolutions differ, in the blocks or `every`."""
    teacher, some = load_pipeline(folder), noise(1)
    state = {
        name: t + some(t) if (every or name.startswith(BLOCKS)) and t.ndim in (2, 4) else t
        for name, t in teacher.denoiser.state_dict().items()
    }
    card = {"teacher": dict(teacher.card)}
    save_model(home, state, teacher.model, SAMPLERS[kind], card)
    return home


def stock(out: Path, teacher: Path, moved: Path | None = None) -> Any:
    """The pipeline that the written card's Python makes; moved: where the teacher is now."""
    text = (out / "README.md" if out.is_dir() else Path(f"{out}.md")).read_text()
    known = json.dumps(str(teacher.resolve()))
    assert f"DiffusionPipeline.from_pretrained({known})" in text
    pipe = ran(text.replace(known, json.dumps(str(moved or teacher))), out.parent)["pipe"]
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", [k for k in SAMPLERS if k != "pixart"])
def test_stock_diffusers_samples_the_student(folders: Folders, tmp_path: Path, kind: str) -> None:
    """To 1e-5 of the range; fused, the network's weights are the student's."""
    folder = folders(kind)
    made = adapted(folder, tmp_path / "student", kind)
    assert to_lora(made, tmp_path / "out") < 1e-5
    student = load_student(made)
    found = [tmp_path / "out"]
    if kind in ("sd", "sdxl"):
        assert to_kohya(made, tmp_path / "out.safetensors") < 1e-5
        found.append(tmp_path / "out.safetensors")
    schedulers = []
    for out in found:
        pipe = stock(out, folder)
        assert against(pipe, student) < 1e-5
        schedulers.append(dict(pipe.scheduler.config))
        pipe.disable_lora()
        assert against(pipe, student) > 1e-3
        pipe.enable_lora()
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
        for name, t in network.state_dict().items():
            ours = student.denoiser.state_dict()[f"net.net.{name}"]
            torch.testing.assert_close(t, ours, rtol=1e-5, atol=1e-6)
    betas = [torch.tensor(config.pop("trained_betas", None) or []) for config in schedulers]
    torch.testing.assert_close(betas[0], betas[-1], rtol=1e-6, atol=0)
    told = [{k: v for k, v in config.items() if k[0] != "_"} for config in schedulers]
    assert told[0] == told[-1]


def test_an_adapter_of_sd3_has_a_workflow(folders: Folders, tmp_path: Path) -> None:
    """ComfyUI reads its names in diffusers; where it cannot follow the steps there is none."""
    made = adapted(folders("sd3"), tmp_path / "student", "sd3")
    to_lora(made, tmp_path / "out")
    nodes = json.loads((tmp_path / "out" / "workflow.json").read_text())
    check_workflow(nodes)
    given = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert given["LoraLoaderModelOnly"]["lora_name"] == "out.safetensors"
    assert given["T5TokenizerOptions"]["min_length"] == 256
    made = adapted(folders("sd"), tmp_path / "unit", "sd", FewStep(625.0, unit=True))
    to_kohya(made, tmp_path / "unit.safetensors")
    assert "| sigmas | none that ComfyUI" in (tmp_path / "unit.safetensors.md").read_text()
    assert not (tmp_path / "unit.workflow.json").exists()


def test_names_and_headers(folders: Folders, tmp_path: Path) -> None:
    """alpha / r is in B, alpha = r in the file, which says where it is from."""
    made = adapted(folders("sd"), tmp_path / "student", "sd")
    to_lora(made, tmp_path / "out")
    to_kohya(made, tmp_path / "out.safetensors")
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    down, up = pairs(load_file(made / "lora.safetensors"))[f"net.net.{layer}"]
    named = load_file(tmp_path / "out" / FILE)
    assert torch.equal(named[f"unet.{layer}.lora_A.weight"], down)
    assert torch.equal(named[f"unet.{layer}.lora_B.weight"], 0.5 * up)
    assert len(named) == 2 * 32
    kohya = load_file(tmp_path / "out.safetensors")
    name = f"lora_unet_{layer.replace('.', '_')}"
    assert torch.equal(kohya[f"{name}.lora_down.weight"], down)
    assert torch.equal(kohya[f"{name}.lora_up.weight"], 0.5 * up)
    assert kohya[f"{name}.alpha"] == 3.0
    assert len(kohya) == 3 * 32
    for path in (tmp_path / "out" / FILE, tmp_path / "out.safetensors"):
        with safe_open(path, "pt") as file:
            told = file.metadata()
        assert (told["rank"], told["alpha"], told["format"]) == ("3", "3", "pt")
        assert told["sampler"] == repr(SAMPLERS["sd"])
    assert told["ss_network_dim"] == "3"
    nodes = json.loads((tmp_path / "out.workflow.json").read_text())
    check_workflow(nodes)
    given = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert given["LoraLoaderModelOnly"]["lora_name"] == "out.safetensors"
    assert given["ManualSigmas"]["sigmas"] == sigmas(load_student(made))
    assert not (tmp_path / "out" / "workflow.json").exists()  # whose names ComfyUI does not read
    for path in (tmp_path / "out" / "README.md", tmp_path / "out.safetensors.md"):
        text = path.read_text()
        assert "base_model_relation: adapter\n" in text
        assert "| rank | `3` |" in text


@pytest.mark.parametrize("shape", [(7, 5), (4, 9), (6, 4, 3, 3), (3, 8, 1, 1)])
def test_the_nearest_product_of_a_rank(shape: tuple[int, ...]) -> None:
    """|W - B A|^2 is the sum of the other singular values' squares, of any rank."""
    change = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(change.flatten(1))
    for rank in range(1, 10):
        down, up = factored(change, rank)
        assert down.shape == (rank, *shape[1:])
        assert up.shape == (shape[0], rank, *(1,) * (len(shape) - 2))
        error = change.flatten(1) - up.flatten(1) @ down.flatten(1)
        left = values[rank:].square().sum()
        torch.testing.assert_close(error.square().sum(), left, rtol=1e-10, atol=1e-24)
        if rank <= len(values):  # both halves carry as much
            torch.testing.assert_close(down.norm(), up.norm(), rtol=1e-10, atol=0)
    assert not up[:, len(values) :].any()


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_a_whole_student_by_its_singular_values(
    folders: Folders, tmp_path: Path, kind: str
) -> None:
    """At full rank it is the student; below, less and less, layer by layer as it must be."""
    made = whole(folders(kind), tmp_path / "student", kind)
    student, before = load_student(made), load_pipeline(folders(kind)).denoiser.state_dict()
    after = student.denoiser.state_dict()
    assert to_lora(made, tmp_path / "full", 1000) < 1e-5
    if kind != "sd3":
        assert to_kohya(made, tmp_path / "full.safetensors", 1000) < 1e-5
    off = [to_lora(made, tmp_path / f"rank-{rank}", rank) for rank in (2, 8)]
    assert off[0] > off[1] > 1e-3
    factors = parts(made, 2).factors
    for layer, (down, up) in factors.items():
        name = f"net.net.{layer}.weight"
        change = (after[name] - before[name]).flatten(1).double()
        error = change - (up.flatten(1) @ down.flatten(1)).double()
        left = torch.linalg.svdvals(change)[2:].square().sum()
        torch.testing.assert_close(error.square().sum(), left, rtol=1e-4, atol=1e-9)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    carried = {f"net.net.{layer}.weight" for layer in factors}
    tables = {name for name in changed - carried if not name.endswith(".weight")}
    assert changed - carried == tables


def test_names_that_are_no_utf_8(folders: Folders, tmp_path: Path) -> None:
    """Libraries that take only such names read what was written by a link; the same tensors."""
    made = whole(folders("sd"), tmp_path / "student", "sd")
    odd = os.fsdecode(b"r\xe9n \xff")
    for format, rank, suffix, inside in (
        ("safetensors", None, ".safetensors", ""),
        ("lora", 1000, "", FILE),
        ("kohya", 1000, ".safetensors", ""),
    ):
        plain, named = (tmp_path / f"{name} {format}{suffix}" for name in ("plain", odd))
        assert export(made, named, format, rank) < 1e-5
        export(made, plain, format, rank)
        stored, same = (load((path / inside).read_bytes()) for path in (named, plain))
        assert stored.keys() == same.keys()
        assert all(torch.equal(stored[name], same[name]) for name in stored)


def test_what_lies_outside_the_blocks_stays_behind(folders: Folders, tmp_path: Path) -> None:
    """A difference at full rank says so."""
    made = whole(folders("sd"), tmp_path / "student", "sd", every=True)
    assert to_lora(made, tmp_path / "out", 1000) > 1e-3
    assert all("_block" in layer for layer in parts(made, 1).factors)


def test_a_smaller_adapter_of_adapters(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rank 3 they are the same again; of rank 1 a part of them. The teacher is read once."""
    made = adapted(folders("sd"), tmp_path / "student", "sd")
    read: list[object] = []
    weights = module.network_weights
    monkeypatch.setattr(
        module, "network_weights", lambda folder: read.append(folder) or weights(folder)
    )
    assert to_lora(made, tmp_path / "same", 3) < 1e-5
    assert len(read) == 1
    assert to_lora(made, tmp_path / "less", 1) > 1e-4
    assert (tmp_path / "less" / FILE).stat().st_size < (tmp_path / "same" / FILE).stat().st_size


def test_a_file_that_loads_as_something_else_is_not_kept(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapted(folders("sd"), tmp_path / "student", "sd")
    to_lora(made, tmp_path / "out")
    found = parts(made)
    layer = next(iter(found.factors))
    down, up = found.factors[layer]
    found.factors[layer] = down, 2 * up
    message = "diffusers makes something else of these adapters, off by"
    with pytest.raises(ValueError, match=message):
        verified(found, tmp_path / "out" / FILE)
    monkeypatch.setattr(module, "save_tensors", dropped)
    with pytest.raises(ValueError, match=message):
        to_lora(made, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "student"}


def dropped(path: Path, state: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write a file without its last layers."""
    save_file(dict(list(state.items())[:-8]), path, facts)


def test_what_cannot_be_an_adapter_is_refused(
    folders: Folders, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def refused(message: str, made: Path, to: str = "lora", rank: int | None = None) -> None:
        with pytest.raises(ValueError, match=message):
            export(made, out, to, rank)
        assert not out.exists()

    trained = adapted(folders("sd"), tmp_path / "a", "sd")
    plain = whole(folders("sd"), tmp_path / "b", "sd")
    refused("b was trained whole; say of which rank its adapter is to be, with --rank", plain)
    refused("--rank is 1 or more, got 0", plain, rank=0)
    refused(
        "--rank is for lora and kohya, not for 'diffusers'; leave it out", plain, "diffusers", 4
    )
    refused("should be a new file that ends in .safetensors", trained, "kohya")
    refused(
        "not distilled from a pipeline, which an adapter belongs to", finished / "runs" / "sid"
    )
    pixart = whole(folders("pixart"), tmp_path / "c", "pixart")
    refused("diffusers has no adapters for PixArtAlphaPipeline", pixart, rank=2)
    sd3 = adapted(folders("sd3"), tmp_path / "d", "sd3")
    refused("names are those of U-Nets, and a StableDiffusion3Pipeline has none", sd3, "kohya")
    told = {"teacher": {"teacher": dict(load_pipeline(folders("sd")).card)}}
    later = adapted(folders("sd"), tmp_path / "e", "sd", **told)
    refused("belong to a student of the pipeline, not to the pipeline itself", later)
    teacher = load_pipeline(folders("sd"))
    state, card = teacher.denoiser.state_dict(), {"teacher": dict(teacher.card)}
    save_model(tmp_path / "f", state, teacher.model, SAMPLERS["sd"], card)
    refused("no layer of this student differs from its teacher", tmp_path / "f", rank=4)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    refused(r"adapters need peft, which is not installed: pip install 'fewstep\[t2i\]'", trained)


def test_from_prompts_to_an_adapter(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distilled, sampled, exported, and exported whole, on the command line."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders("sd_v"), "pipe")
    Path("prompts.txt").write_text("a red cube\na blue ball")
    told = ("--domain", "Prompts('prompts.txt', check=False)", "--method.guidance", "LSG(4.5)")
    sizes = ("--batch", "2", "--accumulate", "2", "--steps", "2", "--optim.lr", "1e-2")
    args = ("distill", "t2i", "--teacher", "pipe", *told, *sizes, "--lora", "LoRA(2)")
    done = fewstep(*args, "--out", "run")
    assert done.code == 0, done.err
    assert fewstep("sample", "run", "--prompts", "a red cube", "--seeds", "0").code == 0
    for args in (("lora",), ("diffusers",), ("lora", "--rank", "1")):
        done = fewstep("export", "run", "-".join(args), "--to", *args)
        assert done.code == 0, done.err
    other = load_file("pipe/unet/diffusion_pytorch_model.safetensors")
    other["conv_in.bias"] += 1
    shutil.copytree("pipe", "before")
    save_file(other, "pipe/unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    done = fewstep("export", "run", "new", "--to", "lora")
    assert done.code == 2
    assert "pass the teacher that they were trained on" in done.err
    pipe = stock(Path("lora"), Path("pipe"), Path("before"))
    student = load_student("run")
    assert against(pipe, student) < 1e-5
    pipe.disable_lora()
    assert against(pipe, student) > 1e-4


def test_no_file_of_stock_programs_carries_a_second_time(folders: Folders, tmp_path: Path) -> None:
    """A flow map of a pipeline, of adapters: refused in a sentence, and exported as a program."""
    teacher, lora, some = load_pipeline(folders("sd")), LoRA(3), noise()
    assert teacher.model is not None
    model = replace(teacher.model, inputs=("s",))
    role = ExtraInputs(lora.adapt(teacher.denoiser), ("s",))
    for p in role.parameters():
        p.data += some(p)
    adapters = role.state_dict()
    base = teacher.model.carried(teacher.denoiser.state_dict(), model)
    card = {"teacher": dict(teacher.card), "lora": encode(lora)}
    home = tmp_path / "student"
    save_model(home, lora.merged(base, adapters), model, Jumps(625.0, 2), card, adapters)
    made = load_student(home)
    z, t, s = torch.randn(2, *model.shape), torch.tensor(500.0), torch.tensor(100.0)
    net = adapter_of(made.denoiser)
    assert net is not None
    cond = {name: tensor.expand(2, *tensor.shape) for name, tensor in net.null().items()}
    with torch.no_grad():
        whole, parts_of_it = made.denoiser(z, t, cond, s=s), role(z, t, cond, s=s)
        assert (made.denoiser(z, t, cond) - whole).abs().max() > 1e-3
    torch.testing.assert_close(whole, parts_of_it, rtol=1e-4, atol=1e-4)
    for name in ("diffusers", "safetensors", "comfyui", "lora", "kohya"):
        message = (
            r"has further inputs \(s\), which .* do not take; --to pt2 and --to onnx write any"
        )
        with pytest.raises(ValueError, match=message):
            export(home, tmp_path / name, name)
    assert export(home, tmp_path / "it.pt2", "pt2") <= 1e-5
    assert "| output | x_0, scaled latents of shape" in (tmp_path / "it.pt2.md").read_text()
