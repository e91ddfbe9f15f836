"""The benchmark of clients: what it does to workflows, how it compares, and its server's words.

ComfyUI itself is run by `make clients` alone; here a small program answers as its server does.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

if not (Path(__file__).parents[1] / "benchmarks").is_dir():
    pytest.skip("benchmarks are not part of this distribution", allow_module_level=True)
pytest.importorskip("diffusers")

from benchmarks import clients
from benchmarks.comfyui_server import ComfyUI
from fewstep.diffusion.samplers import FewStep
from fewstep.export.comfyui import check_workflow, workflow
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.load import with_text_and_vae
from tests.conftest import Folders
from tests.export.test_diffusers_pipeline import student

Node = Mapping[str, Any]
SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
args = dict(zip(sys.argv[1:], sys.argv[2:]))
home, works = Path(args["--base-directory"]), {}
assert args["--listen"] == "127.0.0.1" and "--cpu" in sys.argv
class Handler(BaseHTTPRequestHandler):
    def answer(self, value, code=200):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())
    def do_GET(self):
        if self.path == "/system_stats":
            return self.answer({"system": {"comfyui_version": "0.0.1"}})
        name = self.path.split("/")[-1]
        done = {"status": {"status_str": works[name], "messages": ["out of ideas"]}}
        file = {"filename": "a.png", "subfolder": "", "type": "output"}
        self.answer({name: {**done, "outputs": {"9": {"images": [file]}}}})
    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        if "refused" in sent:
            return self.answer({"error": "no such node"}, 400)
        works["x"] = sent["status"]
        (home / "output" / "a.png").write_bytes(b"PNG")
        self.answer({"prompt_id": "x"})
    def log_message(self, *told):
        pass
HTTPServer(("127.0.0.1", int(args["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text(SERVER)
    return folder


def of(nodes: Mapping[str, Node], kind: str) -> Any:
    """The inputs of the one node of a class."""
    (found,) = (node["inputs"] for node in nodes.values() if node["class_type"] == kind)
    return found


def comes_from(nodes: Mapping[str, Node], link: list[Any]) -> tuple[str, int]:
    return nodes[link[0]]["class_type"], link[1]


def test_a_workflow_is_patched(folders: Folders, tmp_path: Path) -> None:
    made = load_student(student(folders("sd"), tmp_path / "student", FewStep(625.0)))
    nodes = workflow(made, "a.safetensors", "b.safetensors")
    found = clients.patched(nodes, "a dog", 7)
    assert of(found, "CLIPTextEncode")["text"] == "a dog"
    assert of(found, "RandomNoise") == {"noise_seed": 7}
    assert comes_from(found, of(found, "SaveLatent")["samples"]) == ("SamplerCustomAdvanced", 0)
    assert of(found, "VAEDecode")["samples"] == of(found, "SaveLatent")["samples"]
    assert of(nodes, "RandomNoise") == {"noise_seed": 0}  # which is left as it was
    whole = clients.of_checkpoint(nodes)
    check_workflow(whole)
    assert len(whole) == len(nodes) - 1
    model = of(whole, "ModelSamplingDiscrete")["model"]
    assert comes_from(whole, model) == ("CheckpointLoaderSimple", 0)
    with pytest.raises(ValueError, match="one UNETLoader, this has 0"):
        clients.of_checkpoint(whole)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_teacher_in_parts(folders: Folders, tmp_path: Path, adapter: bool) -> None:
    made = load_student(student(folders("sd3"), tmp_path / "student", FewStep(1.0)))
    nodes = workflow(made, "a.safetensors", "b.safetensors", adapter)
    found = clients.in_parts(nodes, "sd3")
    assert "CheckpointLoaderSimple" not in [node["class_type"] for node in found.values()]
    assert comes_from(found, of(found, "CLIPTextEncode")["clip"]) == ("DualCLIPLoader", 0)
    assert of(found, "DualCLIPLoader")["type"] == "sd3"
    assert comes_from(found, of(found, "VAEDecode")["vae"]) == ("VAELoader", 0)
    loader = "LoraLoaderModelOnly" if adapter else "UNETLoader"
    assert comes_from(found, of(found, "BasicGuider")["model"]) == (loader, 0)
    if adapter:
        assert comes_from(found, of(found, loader)["model"]) == ("UNETLoader", 0)
        assert of(found, "UNETLoader")["unet_name"] == "teacher.safetensors"


def test_a_student_is_drawn_from_the_noise_of_comfyui(folders: Folders, tmp_path: Path) -> None:
    """Of all tokens of a prompt, or of CLIP's alone, of which the tiny pipeline has eight."""
    folder = student(folders("sd3"), tmp_path / "student", FewStep(1.0, 2, "ddim"))
    made = with_text_and_vae(load_student(folder))
    assert made.text is not None
    cond: Any = made.text([clients.PROMPT])
    torch.manual_seed(clients.SEED)
    z = torch.randn(1, *made.shape)
    x, whole = clients.drawn(made, clients.PROMPT)
    with torch.no_grad():
        expected = made.sampler(made.denoiser, z, cond)
        assert torch.allclose(made.decode(expected), whole)
    assert torch.allclose(x, expected / 1.5 + 0.06)  # the VAE's own, by the tiny pipeline's factor
    few = clients.drawn(made, clients.PROMPT, 8)[1]
    assert (few - whole).abs().max() > 1e-4
    assert made.denoiser.net.null_prompt.shape[0] == 8 + 256
    net, t = made.denoiser.net.net, torch.tensor([1.0, 0.5])
    velocity = [z]
    for i, step in enumerate((0.5, 0.5)):
        with torch.no_grad():
            v = net(
                hidden_states=velocity[-1],
                timestep=1000 * t[i : i + 1],
                encoder_hidden_states=cond["prompt"][:, :8],
                pooled_projections=cond["pooled"],
                return_dict=False,
            )[0]
        velocity.append(velocity[-1] - step * v)
    assert torch.allclose(made.decode(velocity[-1]), few, atol=1e-5)


def test_names_of_text_encoders() -> None:
    names = ("text_model.a", "text_projection.weight", "encoder.b")
    found = clients.clip_names({name: torch.zeros(1) for name in names})
    assert list(found) == ["text_model.a", "text_projection.weight", "text_model.encoder.b"]


def test_noise_is_that_of_torch() -> None:
    z, later = clients.noise(3, (4, 2, 2), 3)
    torch.manual_seed(3)
    assert torch.equal(z, torch.randn(1, 4, 2, 2))
    torch.manual_seed(4)
    assert torch.equal(torch.stack(later), torch.randn(2, 1, 4, 2, 2))
    assert clients.noise(3, (4, 2, 2), 1)[1] == ()


def test_differences_are_in_steps_of_a_picture(tmp_path: Path) -> None:
    """x = 2 v / 255 - 1 is v, and anything up to v + 1 as well: pictures are rounded down."""
    levels = torch.arange(12.0).reshape(1, 3, 2, 2) * 20
    ours = clients.rounded(2 * (levels + 0.9) / 255 - 1)
    assert torch.equal(ours, levels.to(torch.int16))
    assert clients.rounded(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    theirs = ours.clone()
    theirs[0, 2, 1, 0] -= 6
    assert clients.difference(theirs, ours) == {"largest": 6.0, "mean": 0.5}
    assert clients.difference(ours, ours) == {"largest": 0.0, "mean": 0.0}
    with pytest.raises(ValueError, match="pictures of"):
        clients.difference(theirs, ours[:, :, :1])
    pixels = theirs[0].permute(1, 2, 0).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(clients.read_picture(tmp_path / "a.png"), theirs)
    assert clients.relative(torch.tensor([1.0, 3.5]), torch.tensor([1.0, -4.0])) == 7.5 / 4


def test_a_folder_that_is_not_comfyui_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["clients.py", "--comfyui", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        clients.main()
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"clients.py: error: {tmp_path} is not ComfyUI's folder, which has main.py and comfy/ in "
        "it; give COMFYUI=/path/to/ComfyUI"
    )


def test_the_server(comfyui: Path, tmp_path: Path) -> None:
    with ComfyUI(comfyui, sys.executable, tmp_path / "home") as server:
        assert server.facts == {"comfyui_version": "0.0.1"}
        files = server.run({"status": "success"})
        assert {kind: path.read_bytes() for kind, path in files.items()} == {"images": b"PNG"}
        with pytest.raises(ValueError, match=r"ComfyUI refuses: .*no such node"):
            server.run({"refused": True})
        with pytest.raises(ValueError, match=r"ComfyUI failed: .*out of ideas"):
            server.run({"status": "error"})
    assert server._process.poll() is not None


def test_a_server_that_does_not_start_is_told(comfyui: Path, tmp_path: Path) -> None:
    (comfyui / "main.py").write_text("raise SystemExit('no torch')")
    with (
        pytest.raises(ValueError, match=r"(?s)ended by itself:.*no torch"),
        ComfyUI(comfyui, sys.executable, tmp_path / "home"),
    ):
        raise AssertionError("it started")
