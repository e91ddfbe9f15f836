"""Every architecture with every method, and every architecture read wrongly.

Values, in float64: a student whose fake score is the teacher has nothing to learn (every score
method's gradient is exactly zero there), and away from it autograd agrees with central
differences through student, teacher and fake score. The pre-flight check is given networks that
answer exactly, in the units in which the stock network is told the time: it passes what the
files say, and refuses each file that says otherwise.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Folders

pytest.importorskip("diffusers")

import diffusers

from fewstep.data.embeddings import Conditioned, Embeddings, key
from fewstep.diffusion.encoder_features import feature_shape
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import LogitNormal, Uniform
from fewstep.diffusion.types import Batch
from fewstep.distillation.critic import Critic
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.guidance_scales import LSG, AntiCFG, Kappas, ZeroCFG
from fewstep.distillation.method import Method, Nets
from fewstep.losses.weight import Power
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.methods.sim import SIM
from fewstep.teachers.diffusers.folder import open_folder
from fewstep.teachers.diffusers.load import load_pipeline, read_schedule
from fewstep.teachers.preflight import preflight
from fewstep.training.loop import train
from tests.tiny_pipelines import FLOWS

pytestmark = pytest.mark.slow

KINDS = (
    *("sd", "sd_v", "sdxl", "sd3", "pixart", "pixart_sigma", "sana", "flux", "flux_guided"),
    *("sd35", "flux2", "qwen_image", "z_image"),
)
TEXTS = ["a red cube", "a blue ball", "the small ball"]
REAL = Kappas(1.0, 1.0, 1.0, 8.0)
"""A guided teacher alone, as DMD2 has it."""
each_kind = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True, eq=False)
class WithPictures:
    """Prompts, and a latent for each sample."""

    prompts: Conditioned

    def __call__(self, draws: Draws) -> Batch:
        return self.prompts(draws)._replace(x0=draws.normal("x0", self.prompts.shape))


@pytest.fixture(scope="module")
def taught(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Teacher and source by kind, loaded once. Leave the teacher as it is."""
    made: dict[str, tuple[Generator, WithPictures]] = {}

    def get(kind: str) -> tuple[Generator, WithPictures]:
        if kind not in made:
            teacher = load_pipeline(folders(kind))
            table = Embeddings(tmp_path_factory.mktemp(kind))
            list(table.fill(TEXTS, teacher.text))
            prompts = Conditioned(teacher.shape, table, [key(text) for text in TEXTS])
            made[kind] = teacher, WithPictures(prompts)
        return made[kind]

    return get


def methods(teacher: Generator) -> dict[str, Method]:
    """Each in the setting that this path calls for."""
    flow = teacher.denoiser.net.flow
    times = LogitNormal(0.7, 1.6) if flow else Uniform(20.0, 979.0)
    one, four = FewStep(1.0 if flow else 625.0), FewStep(1.0 if flow else 999.0, 4, unit=not flow)
    told: dict[str, Any] = {"times": times, "weight": Power(0, -1)}
    fake = FakeScore(times, Power(0, -2))
    critic = Critic(times, Power(0, -2), Power(), average="sample")
    return {
        "SiD": SiD(one, fake=fake, **told),
        "SiD-LSG": SiD(one, fake=fake, guidance=LSG(4.5), **told),
        "SIM": SIM(one, fake=fake, **told),
        "Diff-Instruct": DiffInstruct(one, fake=fake, **told),
        "few steps, uniform": SiD(four, fake=fake, guidance=ZeroCFG(), **told),
        "few steps, final": SiD(four, fake=fake, guidance=AntiCFG(), matching="final", **told),
        "DMD2": DMD2(
            four,
            fake=replace(critic, pool="learned"),
            gan=0.1,
            ratio=1,
            times=times,
            guidance=REAL,
        ),
        "SiDA": SiDA(one, fake=critic, gan=0.1, gan_weight=Power(), **told),
    }


@each_kind
def test_every_method_steps(taught: Callable[[str], Any], kind: str) -> None:
    """Finite losses, and gradients that move both nets."""
    teacher, source = taught(kind)
    for name, method in methods(teacher).items():
        prompts = source if method.needs_data else source.prompts
        steps = train(method, teacher.denoiser, teacher.denoiser, prompts, batch=2, steps=1)
        record = next(iter(steps))
        assert record.logs["skipped"] == 0.0, name
        for net in ("student", "fake"):
            assert 0.0 < record.logs[f"{net}/grad_norm"] < float("inf"), (name, net)


@each_kind
def test_the_tap_has_the_shape_that_a_head_is_told(
    taught: Callable[[str], Any], kind: str
) -> None:
    """In pictures all of it, in tokens the channels."""
    teacher, source = taught(kind)
    batch, net = source(Draws.range(0, 2, 0)), teacher.denoiser
    features = net.encode(batch.z, torch.full((2,), 0.5 if net.net.flow else 500.0), batch.cond)
    shape = feature_shape(net)
    assert shape == features.shape[1 : 1 + len(shape)]
    assert features.ndim == (4 if len(shape) == 3 else 3)


def batch_of(source: WithPictures) -> Batch:
    """Two samples in float64."""
    batch = source(Draws.range(0, 2, 0))
    cond = {name: value.double() for name, value in batch.cond.items()}
    return batch._replace(z=batch.z.double(), x0=batch.x0.double(), cond=cond)


def slope(method: Any, nets: Nets, teacher: Any, batch: Batch) -> tuple[Any, list[Tensor]]:
    """The student's loss as a function, and its gradient by autograd."""
    student = nets["student"].requires_grad_(True)
    turn = method.turns(10)[-1]
    assert turn.net == "student"

    def loss() -> Tensor:
        total: Tensor = turn.loss(nets, teacher, batch).total
        return total

    grads = torch.autograd.grad(loss(), list(student.parameters()), materialize_grads=True)
    return loss, list(grads)


STEP = 5e-4
"""Of the differences; some networks compute a part in float32 whatever they are given."""


@each_kind
def test_gradients(folders: Folders, taught: Callable[[str], Any], kind: str) -> None:
    """Nothing to learn at the teacher; elsewhere what central differences say, to 1e-3."""
    teacher, batch = load_pipeline(folders(kind)).denoiser.double(), batch_of(taught(kind)[1])
    known = methods(taught(kind)[0])
    nets = known["SiD"].init(teacher, teacher).requires_grad_(False)
    for name in ("SiD", "SiD-LSG", "SIM", "Diff-Instruct"):
        _, gradient = slope(known[name], nets, teacher, batch)
        assert max(float(g.abs().max()) for g in gradient) < 1e-12, name
    torch.manual_seed(1)
    with torch.no_grad():
        for net in nets.values():
            for p in net.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
    for name in ("SiD-LSG", "SIM", "SiDA"):
        loss, gradient = slope(known[name], nets, teacher, batch)
        size = math.sqrt(sum(float(g.square().sum()) for g in gradient))
        ends = []
        with torch.no_grad():
            for step in (STEP, -2 * STEP, STEP):
                for p, g in zip(nets["student"].parameters(), gradient, strict=True):
                    p.add_(g, alpha=step / size)
                ends.append(float(loss()))
        assert abs((ends[0] - ends[1]) / (2 * STEP) - size) < 1e-3 * size, name


DIRECTIONS, LARGE, SMALL = 16, 12.0, 0.01
"""Latents that lie near a plane, as those of pictures do: its dimensions, variances in and off."""


def near_a_plane(xt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[x_0 | x_t] of a Gaussian near a plane through zero; xt: (B, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(xt[0].numel(), DIRECTIONS, generator=generator, dtype=xt.dtype)
    basis = torch.linalg.qr(noise).Q
    on = (xt.flatten(1) @ basis @ basis.mT).reshape(xt.shape)

    def shrink(x: Tensor, variance: float) -> Tensor:
        return alpha * variance / (alpha**2 * variance + sigma**2) * x

    return shrink(on, LARGE) + shrink(xt - on, SMALL)


def exact(folder: Path) -> Callable[..., tuple[Tensor]]:
    """What the stock network of a perfect teacher would answer, by the folder as it was made."""
    truth = read_schedule(open_folder(folder))

    def forward(x: Tensor, timestep: Tensor, **told: Any) -> tuple[Tensor]:
        t = timestep.double().reshape(-1, 1, 1, 1)
        alpha, sigma = truth.path.alpha(t), truth.path.sigma(t)
        x0 = near_a_plane(x.double(), alpha, sigma)
        eps = (x.double() - alpha * x0) / sigma
        return ({"eps": eps, "v": alpha * eps - sigma * x0}[truth.predicts].float(),)

    return forward


DDPM = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
V, EPS = {"prediction_type": "v_prediction"}, {"prediction_type": "epsilon"}
WRONG = {"sd": (V, DDPM), "sd_v": (EPS, DDPM), "sdxl": (V, DDPM)}
WRONG |= {"pixart": (V, SD), "pixart_sigma": (V, SD)}


@pytest.mark.parametrize("kind", WRONG)
def test_what_files_say_wrongly_is_refused(folders: Folders, tmp_path: Path, kind: str) -> None:
    """Another prediction type, and the betas of another family, are; the right ones pass."""
    answer = exact(folders(kind))
    right = load_pipeline(folders(kind))
    right.denoiser.net.net.forward = answer
    preflight(right, None)
    for number, changes in enumerate(WRONG[kind]):
        folder = tmp_path / str(number)
        shutil.copytree(folders(kind), folder)
        rewritten(folder, changes)
        wrong = load_pipeline(folder)
        wrong.denoiser.net.net.forward = answer
        with pytest.raises(ValueError, match="the teacher does not denoise as its files say"):
            preflight(wrong, None)


def rewritten(folder: Path, changes: dict[str, Any], scheduler: str = "") -> None:
    """Another configuration of the scheduler in the folder, or another scheduler."""
    path, index = folder / "scheduler" / "scheduler_config.json", folder / "model_index.json"
    config = json.loads(path.read_text())
    if scheduler:
        config = dict(getattr(diffusers, scheduler)().config)
        parts = json.loads(index.read_text())
        index.write_text(json.dumps({**parts, "scheduler": ["diffusers", scheduler]}))
    path.write_text(json.dumps({**config, **changes}))


@each_kind
def test_a_flow_is_not_taken_for_betas(folders: Folders, tmp_path: Path, kind: str) -> None:
    """Nor betas for a flow, whatever is predicted; networks are of one kind or the other."""
    folder = tmp_path / "pipe"
    shutil.copytree(folders(kind), folder)
    if kind in FLOWS:
        rewritten(folder, {**SD, **V}, "DDIMScheduler")
        message = "is trained on a flow, but its DDIMScheduler says betas"
    else:
        rewritten(folder, {}, "FlowMatchEulerDiscreteScheduler")
        message = "is trained on betas, but its FlowMatchEulerDiscreteScheduler says a flow"
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder)
