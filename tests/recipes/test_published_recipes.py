"""The published recipes by command, from small snapshots in the published formats.

Learning rates, optimisers and losses are those of the recipes; only steps, batches and the network
are smaller. What Adam does bounds every weight's way: with beta_1 = 0 and beta_2 = 0.999 update n
is at most lr sqrt(n), and the first is lr exactly wherever the gradient is not nearly nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.diffusion.pixels import to_uint8
from fewstep.nets.edm2 import Precond
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.storage.files import read_json
from fewstep.storage.model_folder import load_student
from fewstep.teachers.snapshots import load_snapshot
from tests import snapshot_writer
from tests.cli.test_inspect import SMALL, SONG
from tests.command import fewstep
from tests.picture_files import as_zip, files, labelled, moments, noise
from tests.processes import results

pytestmark = pytest.mark.slow

RGB = SONG | {"img_channels": 3, "augment_dim": 9, "attn_resolutions": [], "dropout": 0.1}
LATENT = SMALL | {"img_channels": 4, "channels_per_head": 8, "logvar_channels": 16}
NETS: dict[str, tuple[type[nn.Module], dict[str, Any], str]] = {
    "uncond.pkl": (EDMPrecond, RGB | {"label_dim": 0}, "edm"),
    "cond.pkl": (EDMPrecond, RGB | {"augment_dim": 0, "use_fp16": True}, "edm"),
    "edm2.pkl": (Precond, LATENT, "edm2"),
}
STEPS, COUNT = 4, 20
TINY = ("--steps", str(STEPS), "--batch", "8", "--save-every", "2", "--sample-every", "100")
PICTURES = ("--domain", "Pictures('tiny.zip')")
AT_ONCE = ("--method.student-from", "1", "--method.adversarial-from", "3")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Snapshots, pictures and latents as published, but small."""
    for name, (cls, kwargs, form) in NETS.items():
        torch.manual_seed(0)
        net = cls(**kwargs)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        (tmp_path / name).write_bytes(snapshot_writer.write(net, kwargs, form))
    labels = [i % 10 for i in range(COUNT)]
    as_zip(tmp_path / "tiny.zip", labelled(files(noise(COUNT, 8, 3)), labels))
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(COUNT, 4, 8, 8)) * 4, rng.uniform(0.1, 1, (COUNT, 4, 8, 8))
    latents = np.concatenate(parts, 1).astype("f4")
    as_zip(tmp_path / "sd.zip", labelled(moments(latents), labels))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def distil(recipe: str, teacher: str, *more: str, out: str = "run", parts: int = 2) -> str:
    """Run a recipe; the folder it ran in."""
    command = ("distill", recipe, "--teacher", teacher, *TINY, "--accumulate", str(parts))
    done = fewstep(*command, "--out", out, *more)
    assert done.code == 0, done.err
    return out


def weights(out: str) -> dict[str, Tensor]:
    return load_file(f"{out}/student/model.safetensors")


def log(out: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def way(out: str, start: dict[str, Tensor]) -> Tensor:
    """How far each weight of the finished student lies from `start`."""
    return torch.cat([(new - start[k]).abs().flatten() for k, new in weights(out).items()])


def test_sid_from_a_file_to_pictures(home: Path) -> None:
    """Weights move as the recipe's Adam lets them; continued and of two processes: equal."""
    distil("sid_cifar10_uncond", "uncond.pkl")
    start = load_snapshot("uncond.pkl").denoiser.state_dict()
    moved, bound = way("run", start), sum(math.sqrt(n + 1) for n in range(STEPS))
    assert float(moved.max()) < 1.001 * 1e-5 * bound + 1e-6  # and float32's own rounding
    assert float((moved > 0.5e-5).double().mean()) > 0.5
    whole = weights("run")
    distil("sid_cifar10_uncond", "uncond.pkl", "--optim.lr", "1e-4", out="faster")
    assert float(way("faster", start).max()) > 2e-4 > 1e-5 * bound  # a negative control

    shutil.rmtree("run/student")
    shutil.rmtree(f"run/checkpoints/step-{STEPS:08d}")
    distil("sid_cifar10_uncond", "uncond.pkl")
    assert [line["step"] for line in log("run")] == [1, 2, 3, 4]
    assert all(torch.equal(whole[key], again) for key, again in weights("run").items())

    results(2, home, two_processes)
    assert all(torch.equal(whole[key], same) for key, same in weights("two").items())

    told = fewstep("inspect", "run").out
    assert hashlib.sha256(Path("uncond.pkl").read_bytes()).hexdigest() in told
    assert "CC BY-NC-SA 4.0 if this is one of NVIDIA's" in told
    made = fewstep("sample", "run", "--seeds", "5-7", "--out", "x.npz")
    assert made.code == 0, made.err
    x = load_student("run").sample(range(5, 8))
    assert np.array_equal(np.load("x.npz")["images"], to_uint8(x))
    student = load_student("run")
    z = 2.5 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = student.denoiser(z, torch.tensor(2.5))
    torch.testing.assert_close(student.sampler(student.denoiser, z / 2.5), expected)


def two_processes() -> None:
    distil("sid_cifar10_uncond", "uncond.pkl", out="two", parts=1)


def test_sida_and_sid2a(home: Path) -> None:
    """Adversarial from the step that is told; SiD2A starts from the SiD student."""
    distil("sida_cifar10_uncond", "uncond.pkl", *PICTURES, *AT_ONCE, out="sida")
    judged = ["student/adversarial" in line for line in log("sida")]
    assert judged == [False, False, False, True]
    slow = ("--optim.lr", "1e-12", *PICTURES, *AT_ONCE)
    distil("sid2a_cifar10_uncond", "uncond.pkl", "--init", "sida", *slow, out="sid2a")
    assert float(way("sid2a", weights("sida")).max()) < 1e-7
    assert float(way("sid2a", load_snapshot("uncond.pkl").denoiser.state_dict()).max()) > 5e-6
    command = ("distill", "sida_cifar10_uncond", "--teacher", "uncond.pkl", *TINY)
    refused = fewstep(*command, "--accumulate", "2", "--out", "no")
    words = "fewstep: this method learns from data: say --domain \"Pictures('PATH')\"\n"
    assert refused == (2, "", words)


def test_half_precision_and_labels_on_this_machine(home: Path) -> None:
    """fp16 recipes run anywhere: nothing is skipped, and losses agree with float32's to 1 %.

    The labels are those of the data set, of which no picture is read.
    """
    for precision in ("fp16", "fp32"):
        recipe = ("sid_imagenet64", "cond.pkl", "--precision", precision, *PICTURES)
        distil(*recipe, out=precision)
    low, full = log("fp16"), log("fp32")
    assert read_json(Path("fp16/run.json"))["run"]["precision"] == "fp16"
    assert low[0]["fake/scale"] == 2.0**16
    assert "fake/scale" not in full[0]
    assert low[-1]["skipped"] == 0
    for key in ("fake/loss", "fake/grad_norm"):
        ratio = low[0][key] / full[0][key]
        assert ratio == pytest.approx(1, abs=1e-2)
        assert ratio != 1
    assert load_student("fp16").classes == 10


def test_edm2_in_latents(home: Path) -> None:
    """SiD without any latent, SiDA with those of the archive; pictures of both are told apart."""
    distil("sid_edm2_xs", "edm2.pkl", out="sid")
    data = ("--domain", "LatentMoments('sd.zip')")
    distil("sida_edm2_xs", "edm2.pkl", *data, *AT_ONCE, "--precision", "fp32", out="sida")
    assert log("sida")[-1]["skipped"] == 0
    assert any(not torch.equal(x, weights("sid")[key]) for key, x in weights("sida").items())
    assert fewstep("report", "sida").code == 0
    page = Path("sida/report.html").read_text(encoding="utf-8")
    assert "Latents: three of their four channels are shown as colours" in page
    command = ("distill", "sida_edm2_xs", "--teacher", "edm2.pkl", *TINY, "--accumulate", "2")
    refused = fewstep(*command, "--out", "no", *PICTURES)
    assert (refused.code, refused.out) == (2, "")
    assert "pictures are (1 or 3, H, W), got Model.shape (4, 8, 8)" in refused.err
