"""Snapshots on the command line: what is told of them is true, what is made of them is equal."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.config import encode
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Karras
from fewstep.nets import edm2 as mp
from fewstep.nets.edm_precond import EDMPrecond, VPPrecond
from fewstep.storage.model_folder import load_student
from fewstep.teachers.snapshots import load_snapshot
from tests import snapshot_writer
from tests.command import fewstep, tree
from tests.pickle_assembler import call, module, network, pickled

SMALL: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 10,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
SONG = SMALL | {"model_type": "SongUNet"}
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any], str]] = {
    "ddpmpp": (EDMPrecond, SONG | {"augment_dim": 9, "sigma_max": float("inf")}, "edm"),
    "vp": (VPPrecond, SONG | {"label_dim": 0}, "edm"),
    "edm2": (mp.Precond, SMALL | {"channels_per_head": 8}, "edm2"),
    "state": (EDMPrecond, SONG, "state"),
}


class Place(NamedTuple):
    """A folder of snapshots, and the networks that they were made from."""

    path: Path
    nets: dict[str, nn.Module]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    home = tmp_path_factory.mktemp("snapshots")
    nets: dict[str, nn.Module] = {}
    for name, (cls, kwargs, form) in KINDS.items():
        torch.manual_seed(0)
        net = cls(**kwargs)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        net = net.half() if name == "edm2" else net
        (home / f"{name}.pkl").write_bytes(snapshot_writer.write(net, kwargs, form))
        nets[name] = net.float().eval()
    whole = (home / "ddpmpp.pkl").read_bytes()
    (home / "cut.pkl").write_bytes(whole[: len(whole) // 2])
    (home / "notes.txt").write_text("years of work")
    (home / "hostile.pkl").write_bytes(pickled({"ema": call("os", "system", "touch canary")}))
    (home / "strange.pkl").write_bytes(pickled({"ema": module({}, class_name="\x1b[2J")}))
    (home / "none.pkl").write_bytes(pickled({"loss": module({"_init_args": ()})}))
    (home / "taken").mkdir()
    (home / "taken" / "book.tex").write_text("more years")
    return Place(home, nets)


@pytest.mark.parametrize("name", KINDS)
def test_inspect_tells_the_truth(name: str, place: Place, monkeypatch: Any) -> None:
    monkeypatch.chdir(place.path)
    _, kwargs, form = KINDS[name]
    net = place.nets[name]
    path = Path(f"{name}.pkl")
    code, out, err = fewstep("inspect", str(path), "--json")
    facts = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (code, err) == (0, "")
    assert facts["bytes"] == path.stat().st_size
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts["what"].startswith("training state" if form == "state" else "network snapshot")
    assert "CC BY-NC-SA 4.0 if this is one of NVIDIA's" in facts["licence"]
    beside = {"edm": ["augment_pipe", "loss_fn"], "edm2": ["encoder", "loss_fn"], "state": []}
    main = "net" if form == "state" else "ema"
    assert sorted(facts["objects"]) == sorted([main, *beside[form]])
    told = facts["objects"][main]
    state = net.state_dict()
    assert told["class"] == type(net).__name__
    wanted = {k: "Infinity" if v == float("inf") else v for k, v in kwargs.items()}
    assert told["arguments"] == wanted
    assert told["tensors"] == len(state)
    assert told["numbers"] == sum(t.numel() for t in state.values())
    assert told["types"] == {"float16" if name == "edm2" else "float32": len(state)}
    assert told["network"] == {
        "parameters": sum(p.numel() for p in net.parameters()),
        "shape": [1, 8, 8],
        "classes": kwargs["label_dim"],
    }
    source = snapshot_writer.source().encode()
    sha = hashlib.sha256(source).hexdigest()
    assert told["source"] == {"characters": len(source), "sha256": sha}
    if form == "state":
        assert facts["not read"] == ["optimizer_state"]
    else:
        assert facts["settings"]["dataset_kwargs"]["path"] == "data/cifar10.zip"
    text = fewstep("inspect", str(path)).out
    for shown in (told["class"], str(told["numbers"]), facts["sha256"], sha):
        assert f"  {shown}\n" in text


@pytest.mark.parametrize("name", KINDS)
def test_convert_keeps_every_bit(name: str, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "new" / name
    code, said, err = fewstep("convert", str(place.path / f"{name}.pkl"), str(out))
    assert (code, said, err) == (0, f"{out}\n", "")
    files = {"model.json", "model.safetensors", "manifest.json"}
    assert {p.name for p in out.iterdir()} == files
    net = place.nets[name]
    direct, stored = load_snapshot(place.path / f"{name}.pkl"), load_student(out)
    assert stored.sampler == Heun(Karras(0.002, 80.0), 18)
    assert (stored.shape, stored.classes) == ((1, 8, 8), KINDS[name][1]["label_dim"])
    assert stored.card["source"]["file"] == f"{name}.pkl"
    assert "NVIDIA" in stored.card["licence"]
    encoder = stored.card["encoder"]
    assert (encoder and encoder["class"]) == ("StabilityVAEEncoder" if name == "edm2" else None)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 20.0])
    cond = torch.tensor([0, 3, 10]) if stored.classes else None
    for generator in (direct, stored):
        assert type(generator.denoiser) is type(net)
        assert generator.denoiser.path == net.path
        assert not generator.denoiser.training
        assert torch.equal(generator.denoiser(x, t, cond), net(x, t, cond))
    assert (direct.model, direct.sampler, direct.card) == (
        *(stored.model, stored.sampler, stored.card),
    )
    facts = json.loads(fewstep("inspect", str(out), "--json").out)
    assert facts["what"].startswith("finished model")
    assert facts["model"] == encode(stored.model)
    types = {"float16" if name == "edm2" else "float32": len(net.state_dict())}
    assert facts["files"]["model.safetensors"]["types"] == types


def test_samples_of_a_converted_model(place: Place, tmp_path: Path) -> None:
    """A one-step student by one call at 2.5; the folder may be there if it is empty."""
    out, file = tmp_path / "sid", tmp_path / "x.npz"
    out.mkdir()
    assert fewstep("convert", str(place.path / "ddpmpp.pkl"), str(out), "--student").code == 0
    made = load_student(out)
    assert made.sampler == FewStep(2.5)
    assert fewstep("sample", str(out), "--seeds", "0-3", "--out", str(file)).code == 0
    assert np.load(file)["images"].shape == (4, 8, 8, 1)
    z = made.sample([5], [2])
    assert z.shape == (1, 1, 8, 8)
    assert bool(z.isfinite().all())


@pytest.mark.usefixtures("known")
def test_a_converted_teacher_is_distilled(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a recipe whose model is the teacher's; the student is rebuilt from its folder."""
    monkeypatch.chdir(tmp_path)
    assert fewstep("convert", str(place.path / "ddpmpp.pkl"), "teacher").code == 0
    Path("mine.py").write_text(
        "from dataclasses import replace\n"
        "import fewstep\n"
        "from fewstep.recipes import digits as base\n"
        "def published() -> base.Run:\n"
        "    model = fewstep.load_student('teacher').model\n"
        "    return replace(base.digits(), model=model, steps=2, batch=4)\n"
    )
    done = fewstep("distill", "mine.py:published", "--teacher", "teacher", "--out", "run")
    assert done.code == 0, done.err
    student = load_student("run")
    assert student.model == load_student("teacher").model
    assert type(student.denoiser) is EDMPrecond
    facts = json.loads(fewstep("inspect", "run", "--json").out)
    assert facts["what"] == "run folder, finished"
    assert facts["student"]["model"] == encode(student.model)
    told = json.loads(
        fewstep("inspect", f"run/checkpoints/{facts['checkpoints'][-1]}", "--json").out
    )
    assert (told["what"].split(",")[0], told["step"]) == ("checkpoint", 2)
    count = len(student.denoiser.state_dict())
    assert told["files"]["nets.safetensors"]["tensors"] == 2 * count


def test_inspect_of_what_fewstep_writes(finished: Path) -> None:
    home = finished / "runs" / "sid"
    facts = json.loads(fewstep("inspect", str(home), "--json").out)
    assert facts["recipe"] == "digits"
    assert facts["student"]["model"]["net"]["width"] == 16
    weights = home / "student" / "model.safetensors"
    alone = json.loads(fewstep("inspect", str(weights), "--json").out)
    assert alone["sha256"] == facts["student"]["files"]["model.safetensors"]["sha256"]
    net = load_student(home).denoiser
    assert alone["numbers"] == sum(t.numel() for t in net.state_dict().values())
    assert fewstep("inspect", str(home)).code == 0


def test_what_comes_from_a_file_cannot_control_a_terminal(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickled({"\x1b[2J\n": 1, "ema": network({}, _init_kwargs={"\x1b]0;": "\r"})}))
    for args in (("inspect", str(path)), ("convert", str(path), str(tmp_path / "out"))):
        result = fewstep(*args)
        assert not set("\x1b\r") & set(result.out + result.err)
    assert r"\x1b[2J\n" in fewstep("inspect", str(path)).out


CASES = {
    "inspect missing.pkl": "there is no file or folder missing.pkl",
    "inspect notes.txt": "notes.txt is no model file: neither a snapshot (.pkl, .pt) nor "
    "safetensors",
    "inspect cut.pkl": "cut.pkl: ",
    "inspect hostile.pkl": "hostile.pkl: the name 'os.system' is not allowed",
    "inspect strange.pkl": "strange.pkl: a class name is no name",
    "inspect taken": "taken is no model: it holds neither manifest.json nor run.json nor "
    "model_index.json",
    "inspect": "fewstep inspect needs: model; fewstep inspect --help tells more",
    "convert missing.pkl new": "there is no file or folder missing.pkl",
    "convert taken new": "taken is a folder; a snapshot is a file (.pkl or .pt)",
    "convert notes.txt new": "notes.txt: neither a pickle nor an archive",
    "convert cut.pkl new": "cut.pkl: ",
    "convert hostile.pkl new": "hostile.pkl: the name 'os.system' is not allowed",
    "convert none.pkl new": "none.pkl: which network is meant is not clear; it holds none",
    "convert ddpmpp.pkl taken": "taken exists already; choose a new or empty folder",
    "convert ddpmpp.pkl notes.txt": "notes.txt exists already; choose a new or empty folder",
    "convert ddpmpp.pkl notes.txt/new": "notes.txt: File exists",
    "convert ddpmpp.pkl new --object G": "ddpmpp.pkl: there is no network 'G'; it holds ema",
    "convert ddpmpp.pkl new --object loss_fn": "ddpmpp.pkl: there is no network 'loss_fn'; it "
    "holds ema",
    "convert ddpmpp.pkl new --objct G": "there is no flag --objct; did you mean --object?",
    "convert ddpmpp.pkl": "fewstep convert needs: out; fewstep convert --help tells more",
}


@pytest.mark.parametrize("command", CASES)
def test_wrong_input_is_one_sentence(command: str, place: Place, monkeypatch: Any) -> None:
    monkeypatch.chdir(place.path)
    before = tree(place.path)
    code, out, err = fewstep(*command.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    words = f"fewstep: {CASES[command]}"
    whole = not CASES[command].endswith(": ")
    assert err == f"{words}\n" if whole else err.startswith(words)
    assert tree(place.path) == before


@pytest.mark.parametrize("size", [0, 1, 7, 9, 100, 5000])
def test_damaged_safetensors(size: int, place: Place, tmp_path: Path) -> None:
    assert fewstep("convert", str(place.path / "vp.pkl"), str(tmp_path / "vp")).code == 0
    whole = (tmp_path / "vp" / "model.safetensors").read_bytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole[:size])
    code, out, err = fewstep("inspect", str(path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"fewstep: {path} is not a safetensors file (")
    (tmp_path / "vp" / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is damaged" in fewstep("inspect", str(tmp_path / "vp")).err


@pytest.mark.parametrize(("low", "high"), [(0x80, 0x01), (0x80, 0x02), (ord("P"), ord("K"))])
def test_safetensors_that_begin_as_a_pickle_or_an_archive(
    low: int, high: int, tmp_path: Path
) -> None:
    """The first bytes are the length of the header, which may be those of another format."""
    entry = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    header = json.dumps(entry).encode().ljust(high << 8 | low)
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert path.read_bytes()[:2] == bytes([low, high])
    code, out, err = fewstep("inspect", str(path), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["numbers"] == 2
