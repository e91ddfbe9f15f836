"""A student as a checkpoint in the original layout, and that file as a teacher again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command import fewstep
from tests.conftest import Folders

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


from fewstep.diffusion.samplers import FewStep
from fewstep.export import checkpoint
from fewstep.export.checkpoint import to_checkpoint
from fewstep.storage.model_folder import load_student, save_model
from fewstep.teachers.diffusers import single_file
from fewstep.teachers.diffusers.load import load_pipeline
from fewstep.teachers.diffusers.single_file import (
    configurations,
    convert_checkpoint,
    layout_of,
    located,
)
from tests import tiny_pipelines, tiny_text

WIDE = 24
"""Of the second text encoder of the tiny SDXL: diffusers tells them apart by their widths."""


def sdxl(home: Path) -> Path:
    """A tiny SDXL whose text encoders differ in width."""
    pipe = tiny_pipelines.sdxl(home)
    pipe.register_modules(
        text_encoder_2=tiny_text.clip(True, pipe.tokenizer_2, WIDE),
        unet=tiny_pipelines.unet(
            16 + WIDE,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=WIDE + 6 * 4,
        ),
    )
    pipe.save_pretrained(home / "pipe")
    return home / "pipe"


def student(folder: Path, home: Path) -> Path:
    """A student whose weights are not the teacher's."""
    teacher = load_pipeline(folder)
    old = teacher.denoiser.state_dict()
    state = {k: v * 1.1 if k.endswith("weight") else v for k, v in old.items()}
    assert teacher.model is not None
    save_model(home, state, teacher.model, FewStep(625.0), {"teacher": dict(teacher.card)})
    return home


@pytest.fixture(
    scope="module",
    params=["sd", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sdxl", "sd2"))],
)
def made(
    request: pytest.FixtureRequest, folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a pipeline, pipe, its student, and that as fast.safetensors."""
    home = tmp_path_factory.mktemp(str(request.param))
    if request.param == "sdxl":
        sdxl(home)
    else:
        shutil.copytree(folders("sd"), home / "pipe")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "sd2":  # by the width of its text encoder, which is 16 here
            patch.setattr(checkpoint, "WIDE", 16)
        student(home / "pipe", home / "student")
        assert to_checkpoint(home / "student", home / "fast.safetensors") == 0
    return home


def test_every_weight_comes_back_as_a_folder(made: Path, tmp_path: Path) -> None:
    """The family is told by names; network, autoencoder and text encoders are equal."""
    kind = {"sd": "Stable Diffusion 1", "sdxl": "SDXL", "sd2": "Stable Diffusion 2"}
    expected = kind[made.name[:-1]]  # pytest numbers its folders
    layout = convert_checkpoint(made / "fast.safetensors", tmp_path / "again", made / "pipe")
    assert layout.name == expected
    record = json.loads((tmp_path / "again" / "conversion.json").read_text())
    assert (record["file"], record["layout"]) == ("fast.safetensors", expected)
    teacher, again = load_student(made / "student"), load_pipeline(tmp_path / "again")
    mine, its = teacher.denoiser.state_dict(), again.denoiser.state_dict()
    assert all(torch.equal(mine[k], its[k]) for k in mine if not k.startswith("net.null"))
    for part in ("vae", "text_encoder", "text_encoder_2"):
        for file in (made / "pipe" / part).glob("*.safetensors"):
            before, after = load_file(file), load_file(tmp_path / "again" / part / file.name)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[k], after[k]) for k in before), part


def test_the_file_says_what_clients_read(made: Path) -> None:
    """ModelSpec with the digest of its own tensors, and a sidecar that says the same."""
    data = (made / "fast.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little")
    facts = json.loads(data[8 : 8 + header])["__metadata__"]
    digest = hashlib.sha256(data[8 + header :]).hexdigest()
    assert facts["modelspec.hash_sha256"] == f"0x{digest}"
    assert facts["modelspec.usage_hint"].startswith("1 step, cfg 1, Euler")
    sidecar = json.loads((made / "fast.json").read_text())
    assert sidecar["notes"] == facts["modelspec.usage_hint"]
    assert (made / "fast.png").read_bytes().startswith(b"\x89PNG")
    assert "fast.png" in (made / "fast.safetensors.md").read_text()


def test_the_card_samples_the_student(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python, run where the file is: the pipeline has the student's weights and steps."""
    monkeypatch.chdir(made)
    text = Path("fast.safetensors.md").read_text()
    assert "\n# pipe in 1" in text
    assert "\nbase_model:" not in text  # a folder here, of which the hub knows nothing
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0].split("pipe(")[0].rsplit("\n", 1)[0], names)
    pipe = names["pipe"]
    net = load_student(made / "student").denoiser.net.net
    assert all(torch.equal(t, pipe.unet.state_dict()[k]) for k, t in net.state_dict().items())
    pipe.scheduler.set_timesteps(1)
    assert pipe.scheduler.timesteps.tolist() == [625]


def test_on_the_command_line(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """export, convert, and a file as a teacher, which is converted once."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders("sd"), "pipe")
    student(Path("pipe"), Path("student"))
    done = fewstep("export", "student", "fast.safetensors", "--to", "checkpoint")
    assert done.code == 0, done.err
    done = fewstep("convert", "fast.safetensors", "folder", "--config", "pipe")
    assert (done.code, done.out) == (0, "folder\n"), done.err
    assert "fast.safetensors is a checkpoint of Stable Diffusion 1" in done.err
    monkeypatch.setattr(
        single_file, "configurations", lambda layout, name="": Path(name or "pipe")
    )
    said: list[str] = []
    assert located("fast.safetensors", said.append) == "fast.pipeline"
    assert said == [
        "fast.safetensors is a checkpoint of Stable Diffusion 1; as a folder it is fast.pipeline"
    ]
    assert located("fast.safetensors", said.append) == "fast.pipeline"
    assert len(said) == 1
    assert located("pipe") == "pipe"
    changed = load_file("fast.safetensors")
    save_file({k: t + 1 for k, t in changed.items()}, "fast.safetensors")
    with pytest.raises(ValueError, match=r"was not made of fast\.safetensors as it is now"):
        located("fast.safetensors")
    done = fewstep("convert", "fast.safetensors", "other", "--config", "student")
    assert done.code == 2
    assert "student is no pipeline folder" in done.err
    done = fewstep("convert", "fast.safetensors", "other", "--config", "pipe", "--student")
    assert "--object and --student are for snapshots" in done.err
    assert not Path("other").exists()


def refused(path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file(state, path)
    return path


def test_files_of_other_kinds(folders: Folders, tmp_path: Path) -> None:
    """Each in one sentence, before anything is converted."""
    one = torch.zeros(1)
    unknown = refused(tmp_path / "wan.safetensors", {"blocks.0.self_attn.q.weight": one})
    with pytest.raises(
        ValueError, match=r"in a layout that is known here .*'blocks\.0\.self_attn"
    ):
        layout_of(unknown)
    marks = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1, 9, 1, 1),
        "cond_stage_model.transformer.x": one,
    }
    with pytest.raises(ValueError, match=r"an inpainting network, or another .*9 channels"):
        layout_of(refused(tmp_path / "inpaint.safetensors", marks))
    sd3 = refused(tmp_path / "sd3.safetensors", {"joint_blocks.0.x_block.attn.qkv.weight": one})
    assert layout_of(sd3).name == "Stable Diffusion 3"
    with pytest.raises(
        ValueError, match=r"is Stable Diffusion 3, a StableDiffusion3Pipeline, but"
    ):
        convert_checkpoint(sd3, tmp_path / "out", folders("sd"))
    attended = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"}
    wide = {**marks, **{name: torch.zeros(4, 768) for name in attended}}
    wide["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(1, 4, 1, 1)
    file = refused(tmp_path / "sd1.safetensors", wide)
    with pytest.raises(ValueError, match=r"prompts of width 768, but .* of width 16"):
        convert_checkpoint(file, tmp_path / "out", folders("sd"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match=r"is not a safetensors file"):
        layout_of(tmp_path / "cut.safetensors")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*partial*"))


def test_configurations_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def nothing(name: str, **more: Any) -> str:
        raise OSError(f"no {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    layout = single_file.LAYOUTS[0]
    with pytest.raises(ValueError, match=r"of SDXL, which are not .*--config PIPELINE"):
        configurations(layout)
    with pytest.raises(ValueError, match=r"could not be fetched from me/mine"):
        configurations(layout, "hub:me/mine")
    assert configurations(layout, "pipe") == Path("pipe")


def test_layers_that_a_configuration_leaves_behind(made: Path, tmp_path: Path) -> None:
    """A file with more numbers than its folder has places for is refused."""
    state = load_file(made / "fast.safetensors")
    state["model.diffusion_model.input_blocks.9.0.in_layers.0.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"numbers of the unet, and|cannot be converted with"):
        convert_checkpoint(tmp_path / "more.safetensors", tmp_path / "out", made / "pipe")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["flux", "sd_bert"])
def test_students_without_such_a_layout(folders: Folders, tmp_path: Path, kind: str) -> None:
    home = tmp_path / "student"
    teacher = load_pipeline(folders(kind))
    assert teacher.model is not None
    first = 1.0 if kind == "flux" else 625.0
    card = {"teacher": dict(teacher.card)}
    save_model(home, teacher.denoiser.state_dict(), teacher.model, FewStep(first), card)
    told = {"flux": "this is a FluxPipeline; use --to diffusers", "sd_bert": "for a BertModel"}
    with pytest.raises(ValueError, match=told[kind]):
        to_checkpoint(home, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
