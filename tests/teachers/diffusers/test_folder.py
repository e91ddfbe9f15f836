"""A folder is somebody else's: what would run, or is not what it says, is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Folders

pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file

from fewstep.teachers.diffusers.folder import open_folder
from fewstep.teachers.diffusers.load import load_pipeline


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    """Set keys of a JSON file."""

    def act(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return act


def move(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


def script(folder: Path) -> None:
    (folder / "unet" / "pipeline.py").write_text("raise SystemExit('executed')")


def narrow(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.bias"] = torch.zeros(3)
    save_file(state, path)


def shard(path: Path) -> None:
    """Replace a file by two shards and their index, as diffusers and transformers name them."""
    stem, state = path.name.removesuffix(".safetensors"), load_file(path)
    names, variant = sorted(state), "." + stem.split(".")[1] if "." in stem else ""
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = f"{stem}-0000{number}-of-00002.safetensors"
        save_file({key: state[key] for key in part}, path.parent / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = path.with_name(f"{stem.split('.')[0]}.safetensors.index{variant}.json")
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    path.unlink()


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "code": (script, r"holds code \(unet/pipeline.py\); remove it first"),
    "a pipeline of one's own": (
        edit("model_index.json", _class_name="MyPipeline"),
        "is a MyPipeline; fewstep knows StableDiffusionPipeline, ",
    ),
    "a pipeline with its module": (
        edit("model_index.json", _class_name=["pipe", "MyPipeline"]),
        "fewstep knows",
    ),
    "a part of another library": (
        edit("model_index.json", unet=["mylib", "UNet2DConditionModel"]),
        "unet is mylib.UNet2DConditionModel, which fewstep does not load; "
        "it knows UNet2DConditionModel",
    ),
    "a part of another class": (
        edit("model_index.json", text_encoder=["transformers", "AutoModel"]),
        "text_encoder is transformers.AutoModel, which fewstep does not load",
    ),
    "a part too many": (
        edit("model_index.json", helper=["diffusers", "AutoModel"]),
        "a StableDiffusionPipeline has no part 'helper'",
    ),
    "a missing part": (edit("model_index.json", vae=[None, None]), "needs vae"),
    "a missing folder": (lambda f: shutil.rmtree(f / "vae"), "has no folder vae"),
    "pickles": (
        move(WEIGHTS, "unet/diffusion_pytorch_model.bin"),
        r"no diffusion_pytorch_model.safetensors \(but diffusion_pytorch_model.bin\); save the ",
    ),
    "a remote class": (
        edit("unet/config.json", auto_map={"AutoModel": "x.Y"}),
        "has auto_map, which fewstep does not load",
    ),
    "quantised": (
        edit("unet/config.json", quantization_config={"bits": 4}),
        "has quantization_config, which fewstep does not load",
    ),
    "an unknown argument": (
        edit("unet/config.json", wide=True),
        r"unet/config.json says 'wide', which a UNet2DConditionModel of the installed diffusers",
    ),
    "nonsense in an argument": (
        edit("unet/config.json", down_block_types=["Evil"]),
        "UNet2DConditionModel cannot be built so",
    ),
    "other weights": (
        narrow,
        r"do not fit the configuration in 1 places, first conv_in.bias: expected \(8,\), found "
        r"\(3,\)",
    ),
    "a schedule of its own": (
        edit("scheduler/scheduler_config.json", prediction_type="sample"),
        "DDIMScheduler has prediction_type 'sample', which fewstep does not know there",
    ),
    "strange betas": (
        edit("scheduler/scheduler_config.json", beta_schedule="sigmoid"),
        "beta_schedule 'sigmoid', which fewstep does not know",
    ),
    "betas out of range": (
        edit("scheduler/scheduler_config.json", beta_start=-1.0),
        "has no sensible betas: -1 to 0.012 in 1000 steps",
    ),
    "a scheduler of another kind": (
        edit("model_index.json", scheduler=["diffusers", "EDMEulerScheduler"]),
        "scheduler is diffusers.EDMEulerScheduler, which fewstep does not load",
    ),
    "broken JSON": (
        lambda f: (f / "unet" / "config.json").write_text("{") and None,
        "is not readable JSON",
    ),
    "endless prompts": (
        edit("tokenizer/tokenizer_config.json", model_max_length=10**30),
        r"model_max_length should be 1 to 10000, got 1000",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders_are_refused(folders: Folders, tmp_path: Path, case: str) -> None:
    change, message = HOSTILE[case]
    folder = tmp_path / "pipe"
    shutil.copytree(folders("sd"), folder)
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder)


def test_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no pipeline folder"):
        open_folder(tmp_path)


def test_private_keys_and_pickles_beside_are_passed_over(folders: Folders, tmp_path: Path) -> None:
    """The same network as without them."""
    folder = tmp_path / "pipe"
    shutil.copytree(folders("sd"), folder)
    edit("unet/config.json", _name_or_path="https://example.org/x", _secret=1)(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not a pickle")
    mine, plain = load_pipeline(folder), load_pipeline(folders("sd"))
    assert mine.model == plain.model
    assert "_secret" not in str(mine.model)
    for a, b in zip(mine.denoiser.parameters(), plain.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)


def test_half_precision_weights_are_found(folders: Folders, tmp_path: Path) -> None:
    """A folder that holds the fp16 variant alone; its weights become float32."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folders("sd"), dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    half, full = load_pipeline(tmp_path / "half"), load_pipeline(folders("sd"))
    for a, b in zip(half.denoiser.parameters(), full.denoiser.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.half().float())
    assert half.text(["a red cube"])["prompt"].dtype == torch.float32


def test_older_names_of_pixart_are_known(folders: Folders, tmp_path: Path) -> None:
    """Published folders name a class with more arguments than PixArt used."""
    folder = tmp_path / "pipe"
    shutil.copytree(folders("pixart"), folder)
    edit("model_index.json", transformer=["diffusers", "Transformer2DModel"])(folder)
    edit("transformer/config.json", num_vector_embeds=None, only_cross_attention=False)(folder)
    assert load_pipeline(folder).model == load_pipeline(folders("pixart")).model


def test_shards_are_put_together_and_other_weights_left(folders: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "pipe"
    shutil.copytree(folders("sd"), folder)
    state = load_file(folder / WEIGHTS)
    shard(folder / WEIGHTS)
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    save_file(other, folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    found = load_pipeline(folder).denoiser.net.net.state_dict()
    assert all(torch.equal(found[key], state[key]) for key in state)
