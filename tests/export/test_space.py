"""Spaces: what is written, that it holds the student, and that the app runs where gradio is."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.diffusion.model import Model
from fewstep.diffusion.pixels import to_uint8
from fewstep.diffusion.samplers import FewStep
from fewstep.export.formats import export
from fewstep.export.space import NEEDS, app, readme
from fewstep.methods.sid import SiD
from fewstep.nets.mlp import MLP
from fewstep.storage.model_folder import load_student, save_student
from fewstep.teachers.diffusers.load import load_pipeline
from tests.command import fewstep

GRADIO = os.environ.get("FEWSTEP_GRADIO", "")
"""A Python that has gradio, where it is not beside fewstep, since it wants an older pillow."""


@pytest.fixture(scope="module")
def space(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("space") / "digits"
    done = fewstep("export", str(finished / "runs/sid"), str(out), "--to", "space")
    assert done.code == 0, done.err
    return out


def front(page: Path) -> dict[str, str]:
    head = page.read_text(encoding="utf-8").split("---\n")[1]
    return {key: value.strip() for key, _, value in (s.partition(":") for s in head.splitlines())}


def test_what_a_space_is_set_up_by(finished: Path, tmp_path: Path) -> None:
    """The keys of the hub's configuration; digits need no GPU, and the app nothing of fewstep."""
    student = load_student(finished / "runs/sid")
    (tmp_path / "README.md").write_text(readme(student, finished / "runs/sid", "program"))
    assert front(tmp_path / "README.md") == {
        "title": '"A student of SiD in 1 call"',
        "emoji": "\u26a1",
        "colorFrom": "blue",
        "colorTo": "red",
        "sdk": "gradio",
        "sdk_version": "6.31.0",
        "app_file": "app.py",
        "suggested_hardware": "cpu-basic",
        "pinned": "false",
    }
    text = app(student, "program", tmp_path)
    modules = set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) - sys.stdlib_module_names
    needs = {re.split(r"\W", need)[0] for need in NEEDS["program"]}
    assert modules == needs - {"pillow"} | {"PIL"}
    assert NEEDS["program"][0] == "gradio==6.31.0"
    compile(text, "app.py", "exec")
    assert "@" not in text


def definitions(text: str, folder: Path) -> dict[str, Any]:
    """The names of an app before its page, which needs gradio."""
    names: dict[str, Any] = {"__file__": str(folder / "app.py")}
    before = text.replace("import gradio as gr\n", "").partition("\nwith gr.")[0]
    exec(compile(before, "app.py", "exec"), names)
    return names


def test_the_app_asks_its_program(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise of torch's seed, the class that is asked for or one in turn; enlarged whole."""

    class Program:
        def module(self) -> Any:
            return lambda feed: feed["z"] * 0 + feed["label"] / 10

    def load(path: Path, extra_files: dict[str, str]) -> Program:
        assert path == tmp_path / "student.pt2"
        about = {"z": {"shape": ["B", 1, 8, 8], "type": "float32"}}
        about["label"] = {"shape": ["B"], "type": "int64"}
        extra_files["fewstep.json"] = json.dumps({"inputs": about, "classes": 10})
        return Program()

    monkeypatch.setattr(torch.export, "load", load)
    made = definitions(app(load_student(finished / "runs/sid"), "program", tmp_path), tmp_path)
    levels = [int(np.asarray(picture)[0, 0, 0]) for picture in made["make"](-1, 13, 3)]
    assert levels == [int(127.5 * c / 10 + 128) for c in (3, 4, 5)]
    assert np.asarray(made["make"](10, 13, 1)[0]).max() == 255
    assert made["make"](3, 7, 1)[0].size == (320, 320)
    assert [len(made["make"](0, 0, n)) for n in (0, 2, 10**6)] == [1, 2, 16]
    wide = made["picture"](torch.linspace(-1, 1, 3 * 4 * 2).view(1, 3, 4, 2))
    assert wide.size == (160, 320)
    assert [int(v) for v in np.asarray(wide)[0, 0]] == [0, 89, 177]


@pytest.mark.slow
def test_the_app_makes_the_student_s_pictures(space: Path, finished: Path) -> None:
    """From the files of the export alone: x_0 of the noise of torch's seed."""
    assert sorted(p.name for p in space.iterdir()) == [
        *("README.md", "app.py", "requirements.txt", "student.pt2")
    ]
    made = definitions((space / "app.py").read_text(encoding="utf-8"), space)
    student = load_student(finished / "runs/sid")
    z = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    expected = student.sampler(student.denoiser, z, torch.tensor([3]))
    assert torch.allclose(made["sample"](7, 3), expected, atol=1e-5)
    shown = np.asarray(made["make"](3, 7, 1)[0])[::40, ::40, 0].astype(int)
    assert np.abs(shown - to_uint8(expected)[0, ..., 0].numpy().astype(int)).max() <= 1


@pytest.mark.slow
def test_a_pipeline_s_app(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroGPU's front matter and decorator, and a picture by the pipeline that was written."""
    teacher = load_pipeline(folders("sd"))
    assert teacher.model is not None
    method = SiD(FewStep(999.0, 2, unit=True))
    card = {"teacher": dict(teacher.card)}
    save_student(tmp_path / "run", teacher.denoiser, teacher.model, method, card)
    assert export(tmp_path / "run", tmp_path / "out", "space") < 1e-5
    head = front(tmp_path / "out/README.md")
    assert (head["suggested_hardware"], head["sdk"]) == ("zero-a10g", "gradio")
    text = (tmp_path / "out/app.py").read_text(encoding="utf-8")
    assert "gpu = spaces.GPU\n" in text
    assert text.index("import spaces") < text.index("PIPE = ")
    assert re.search(r"@gpu\ndef make\(prompt, seed\):", text)
    made = definitions(text, tmp_path / "out")
    one, again, other = (made["make"]("a red cube", seed) for seed in (3, 3, 4))
    assert one.tobytes() == again.tobytes() != other.tobytes()


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    model = Model(MLP(8, 1), (2,))
    save_student(tmp_path / "points", model.build(), model, SiD(), {})
    with pytest.raises(ValueError, match=r"makes samples of shape \(2,\), and a Space shows"):
        export(tmp_path / "points", tmp_path / "out", "space")
    assert not (tmp_path / "out").exists()


PYTHON = GRADIO or (sys.executable if importlib.util.find_spec("gradio") else "")


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="needs gradio, here or in the Python FEWSTEP_GRADIO")
def test_the_app_runs(space: Path, tmp_path: Path) -> None:
    """Started as a person starts it, and asked for pictures by gradio's own client."""
    ask = """
import os, sys
os.chdir(sys.argv[1]); sys.path.insert(0, ".")
import app
from gradio_client import Client
_, url, _ = app.demo.launch(prevent_thread_lock=True, quiet=True)
found = Client(url, verbose=False).predict(3, 7, 2, api_name="/make")
print(*(entry["image"] for entry in found), sep="\\n")
app.demo.close()
"""
    hub = {"HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run(
        [PYTHON, "-c", ask, str(space)],
        env={**os.environ, **hub},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pictures = [Image.open(line) for line in done.stdout.splitlines() if line.startswith("/")]
    assert [picture.size for picture in pictures] == [(320, 320)] * 2
    text = (space / "app.py").read_text(encoding="utf-8")
    expected = definitions(text, space)["make"](3, 7, 1)[0]
    near = np.asarray(pictures[0].convert("RGB")).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(near).mean() < 4  # webp
