"""From a pipeline folder and prompts to pictures, on the command line.

The tiny teacher predicts v with a small output layer: v = 0 is the exact denoiser of standard
normal latents, so it passes the pre-flight check; the same folder declared to predict eps fails.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.load import load_pipeline
from tests import tiny_pipelines
from tests.command import fewstep, tree

TEXTS = ["a red cube", "a blue ball", "the small ball"]
DISTIL = (
    *("distill", "t2i", "--teacher", "pipe", "--domain", "Prompts('prompts.txt')"),
    *("--method.guidance", "LSG(4.5)", "--batch", "4", "--accumulate", "2", "--optim.lr", "1e-3"),
    *("--steps", "4", "--sample-every", "2", "--save-every", "2"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, pipe, prompts.txt, and a finished run. Leave it as it is."""
    home = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    pipe = tiny_pipelines.sd_v(home)
    with torch.no_grad():
        for p in pipe.unet.conv_out.parameters():
            p.mul_(0.05)
    pipe.save_pretrained(home / "pipe")
    (home / "prompts.txt").write_text("\n".join(TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        done = fewstep(*DISTIL, "--out", "run")
        assert done.code == 0, done.err
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same without the run, which is where we are."""
    for name in ("pipe", "prompts.txt.embeddings"):
        shutil.copytree(trained / name, tmp_path / name)
    shutil.copy(trained / "prompts.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_prompts_to_pictures(trained: Path, home: Path) -> None:
    shutil.copytree(trained / "run", "run")
    run = json.loads(Path("run/run.json").read_text())["run"]
    assert run["model"]["net"]["class_name"] == "UNet2DConditionModel"
    assert run["model"]["path"]["type"] == "Timesteps"
    assert len(run["domain"]["sha256"]) == 64
    student, teacher = load_student("run"), load_pipeline("pipe")
    old, new = teacher.denoiser.state_dict(), student.denoiser.state_dict()
    assert torch.equal(new["net.null_prompt"], old["net.null_prompt"])
    assert not torch.equal(new["net.net.conv_in.weight"], old["net.net.conv_in.weight"])
    gauges = [json.loads(line) for line in Path("run/gauges.jsonl").read_text().splitlines()]
    assert [g["step"] for g in gauges] == [0, 2, 4]
    assert gauges[0]["levels"][4]["fisher"] == 0.0 < gauges[2]["levels"][4]["fisher"]
    made = fewstep("sample", "run", "--prompts", "a red cube", "--seeds", "5,6", "--out", "a.npz")
    assert made.code == 0, made.err
    pictures = np.load("a.npz")["images"]
    z = torch.cat([_noise(seed) for seed in (5, 6)])
    x = student.sampler(student.denoiser, z, teacher.text(["a red cube"] * 2))
    expected = ((teacher.decode(x).clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    assert np.abs(pictures.astype(float) - expected.numpy()).max() <= 0.51
    assert fewstep("sample", "pipe", "--prompts", "prompts.txt", "--seeds", "0-2").code == 0
    assert fewstep("export", "run", "out").code == 0
    assert fewstep("export", "run", "net.safetensors", "--to", "safetensors").code == 0


def stopped(trained: Path) -> None:
    """The run as it was at step 2, here."""
    shutil.copytree(trained / "run", "cut")
    for folder in ("student", "checkpoints/step-00000004"):
        shutil.rmtree(Path("cut", folder))


def _noise(seed: int) -> torch.Tensor:
    from fewstep.diffusion.rng import Draws

    return Draws(torch.tensor([seed]), 0, "sample/").normal("z", (4, 8, 8))


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_student(trained: Path, home: Path) -> None:
    """From its second checkpoint, in another place, with what was encoded before."""
    cached = tree(home / "prompts.txt.embeddings")
    stopped(trained)
    again = fewstep(*DISTIL, "--out", "cut")
    assert "continuing from step 2 of 4" in again.err
    weights = "student/model.safetensors"
    assert (home / "cut" / weights).read_bytes() == (trained / "run" / weights).read_bytes()
    assert tree(home / "prompts.txt.embeddings") == cached  # encoded once


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no teacher": (
        ("distill", "t2i", "--domain", "Prompts('prompts.txt')"),
        "this run takes its network from its teacher: pass a pipeline folder",
    ),
    "no prompts": (("distill", "t2i", "--teacher", "pipe", "--domain.file", "x.txt"), "no file x"),
    "data": ((*DISTIL, "--method", "SiDA(FewStep(625))"), "a file of prompts has no pictures"),
    "steps of another path": (
        (*DISTIL, "--method", "SiD(FewStep(80.0), guidance=LSG(4.5))"),
        "does not fit the times",
    ),
    "no such format": (
        ("export", "run", "out", "--to", "safetensor"),
        "there is no format 'safetensor'; did you mean 'safetensors'?",
    ),
    "unheard": (("sample", "pipe"), "pipe needs --prompts, a text or a file of them"),
    "another's decoder": (
        ("sample", "pipe", "--prompts", "a red cube", "--vae", "pipe/vae"),
        "pipe decodes its latents itself: leave out --vae",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_in_a_sentence(home: Path, case: str) -> None:
    args, message = WRONG[case]
    done = fewstep(*args)
    assert done.code == 2, done.err
    assert not list(home.glob("runs/*/run.json"))  # no folder is claimed
    assert message in done.err.splitlines()[-1]


@pytest.mark.slow
def test_a_student_is_a_teacher_in_its_turn(trained: Path, home: Path) -> None:
    """With the pipeline's encoders, found again by way of both cards."""
    shutil.copytree(trained / "run", "run")
    again = [*DISTIL[:3], "run", *DISTIL[4:]]
    unchecked = [*again[:5], "Prompts('prompts.txt', check=False)", *again[6:]]
    done = fewstep(*unchecked, "--steps", "1", "--out", "next")
    assert done.code == 0, done.err
    assert load_student("next").model == load_student("run").model == load_pipeline("pipe").model
    assert load_student("next").card["teacher"]["teacher"]["pipeline"] == "StableDiffusionPipeline"
    assert fewstep("sample", "next", "--prompts", "a red cube", "--seeds", "0").code == 0


def test_a_broken_pipeline_is_no_teacher(home: Path) -> None:
    path = home / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.bias"][1] = float("nan")
    save_file(state, path, {"format": "pt"})
    done = fewstep(*DISTIL, "--out", "run")
    assert done.code == 2
    assert "pipe holds numbers that are not finite, in net.net.conv_in.bias" in done.err


def test_prompts_that_changed_are_another_run(trained: Path, home: Path) -> None:
    shutil.copytree(trained / "run", "run")
    Path("prompts.txt").write_text("other")
    done = fewstep(*DISTIL, "--out", "run")
    assert done.code == 2
    assert "in use by a run with other settings (run.domain.sha256 was" in done.err


def test_a_pipeline_and_prompts_may_move(trained: Path, home: Path) -> None:
    """The run is told by digests: the file by its absolute path, pipeline and cache elsewhere."""
    stopped(trained)
    Path("new").mkdir()
    Path("pipe").rename("new/pipe")
    Path("prompts.txt").rename("new/p.txt")
    domain = f"Prompts('{home}/new/p.txt', cache='{home}/new/cache')"
    moved = ["distill", "t2i", "--teacher", "new/pipe", "--domain", domain, *DISTIL[6:]]
    done = fewstep(*moved, "--out", "cut")
    assert done.code == 0, done.err
    assert "continuing from step 2 of 4" in done.err
    weights = "student/model.safetensors"
    assert (home / "cut" / weights).read_bytes() == (trained / "run" / weights).read_bytes()
    facts = json.loads(Path("cut/run.json").read_text())
    assert facts["teacher"] == str(home / "new/pipe")
    assert facts["run"]["domain"]["file"] == f"{home}/new/p.txt"


@pytest.mark.parametrize(
    ("part", "said"), [("unet", "weights"), ("text_encoder", "text"), ("vae", "vae")]
)
def test_another_part_in_its_place_is_another_teacher(
    part: str, said: str, trained: Path, home: Path
) -> None:
    """Each part that a run rests on, of the same shapes under the same name."""
    stopped(trained)
    (path,) = Path("pipe", part).glob("*.safetensors")
    state = load_file(path)
    save_file({name: t + 0.01 for name, t in state.items()}, path, {"format": "pt"})
    before = tree(home / "cut")
    done = fewstep(*DISTIL, "--out", "cut")
    assert done.code == 2
    assert f"{home / 'pipe'} no longer holds what the run was started with" in done.err
    assert f"digests.teacher.{said} was " in done.err
    assert tree(home / "cut") == before


def test_a_teacher_of_another_prediction_is_refused_before_training(home: Path) -> None:
    path = home / "pipe" / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("v_prediction", "epsilon"))
    done = fewstep(*DISTIL, "--out", "run")
    assert done.code == 2
    assert "the teacher does not denoise as its files say" in done.err
    assert not (home / "run" / "log.jsonl").exists()
    anyway = [*DISTIL[:5], "Prompts('prompts.txt', check=False)", *DISTIL[6:]]
    assert fewstep(*anyway, "--steps", "1", "--out", "run").code == 0


@pytest.mark.slow
def test_another_size_is_trained_and_sampled(home: Path) -> None:
    """24 x 16 pixels: the run is of that size, whatever the teacher's own; then a third one."""
    done = fewstep(*DISTIL, "--size", "24x16", "--steps", "1", "--out", "wide")
    assert done.code == 0, done.err
    again = fewstep(*DISTIL, "--size", "24x16", "--steps", "1", "--out", "wide")
    assert "wide is finished already" in again.err
    assert fewstep(*DISTIL, "--steps", "1", "--out", "wide").code == 2  # another run
    student = load_student("wide")
    assert student.shape == (4, 8, 12)
    sample = ("sample", "wide", "--prompts", "a red cube", "--seeds", "0-1", "--out")
    for name, size, shape in (
        ("a.npz", (), (2, 16, 24, 3)),
        ("b.npz", ("--size", "16x20"), (2, 20, 16, 3)),
    ):
        done = fewstep(*sample, name, *size)
        assert done.code == 0, done.err
        assert np.load(name)["images"].shape == shape
    done = fewstep("export", "wide", "out")
    assert done.code == 0, done.err
    assert "guidance_scale=0, height=16, width=24)" in Path("out/README.md").read_text()
    for size, message in (
        ("24", "a size is WIDTHxHEIGHT in pixels, such as 1024x768, got '24'"),
        ("25x16", "this model makes pictures of multiples of 2 pixels, got 25x16"),
    ):
        done = fewstep(*sample, "c.npz", "--size", size)
        assert (done.code, message in done.err) == (2, True)
