"""--solver and --steps: which sampler they make of a teacher's, and what students refuse."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.cli.sampling import Sampling
from fewstep.cli.sampling_flags import sampling_flags
from fewstep.diffusion.assisted import Assisted, Corrected, Gated, Handover
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath
from fewstep.diffusion.pixels import to_uint8
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun, Jumps, MultiStep
from fewstep.diffusion.time_distributions import Discrete, Karras, NoiseLevels, Shifted
from fewstep.diffusion.types import Sampler
from fewstep.domains.ring import Ring
from fewstep.methods.sid import SiD
from fewstep.nets.mlp import MLP
from fewstep.runs.run import Run
from fewstep.runs.runner import execute
from fewstep.storage.model_folder import load_student
from fewstep.teachers.gaussian import Gaussian, GaussianMixture
from tests.command import fewstep

MINE = """
class Small:
    name, dim = "small", 4

    def __call__(self, pictures):
        x = (pictures.float()[..., 0] / 255).view(-1, 2, 4, 2, 4).mean((2, 4)).flatten(1)
        return x, 5 * x
"""


def teacher(sampler: Sampler, path: NoisePath = VE(), **card: Any) -> Generator:
    mean = torch.tensor([0.4, -0.7])
    return Generator(Gaussian(mean, 0.3, path), sampler, (2,), card=card)


EDM = teacher(Heun(Karras(), 18))
FLOW = teacher(Heun(Shifted(3.0, 1e-3), 28, 1), Flow())
BETAS = teacher(FewStep(999.0, 50, "ddim", unit=True), VP(), folder="pipe")
STUDENT = teacher(FewStep(2.5, 1, "fixed"), method="SiD()")
FOUR = Discrete((249.0, 499.0, 749.0, 999.0))


@pytest.mark.parametrize(
    ("sampling", "generator", "expected"),
    [
        (Sampling(), EDM, EDM.sampler),
        (Sampling(), BETAS, BETAS.sampler),
        (Sampling(steps=7), EDM, Heun(Karras(), 7)),
        (Sampling(steps=3), STUDENT, FewStep(2.5, 3, "fixed")),
        (Sampling(steps=7), FLOW, Heun(Shifted(3.0, 1e-3), 7, 1)),
        (Sampling(steps=4), BETAS, FewStep(999.0, 4, "ddim", unit=True)),
        (Sampling(solver="heun"), FLOW, Heun(Shifted(3.0, 1e-3), 28)),
        (Sampling(solver="ddim"), EDM, Heun(Karras(), 18, 1)),
        (Sampling(solver="dpm++", steps=9), EDM, MultiStep(Karras(), 9, "dpm++")),
        (Sampling(solver="unipc"), FLOW, MultiStep(Shifted(3.0, 1e-3), 28, "unipc")),
        (Sampling(solver="ddim", steps=4), BETAS, FewStep(999.0, 4, "ddim", unit=True)),
        (Sampling(solver="heun", steps=4), BETAS, Heun(FOUR, 4)),
        (Sampling(solver="unipc", steps=4), BETAS, MultiStep(FOUR, 4, "unipc")),
        (Sampling(steps=5, schedule="karras"), EDM, Heun(NoiseLevels(), 5)),
        (
            Sampling(solver="unipc", schedule="logsnr", steps=5),
            EDM,
            MultiStep(NoiseLevels(rho=math.inf), 5, "unipc"),
        ),
    ],
    ids=lambda value: repr(getattr(value, "sampler", value)),
)
def test_the_sampler_that_is_asked_for(
    sampling: Sampling, generator: Generator, expected: Sampler
) -> None:
    """On the teacher's own times; of betas on whole timesteps."""
    made = sampling.applied(generator)
    assert made.sampler == expected
    assert made.sample(range(3)).isfinite().all()
    own = expected == generator.sampler
    assert sampling.record(generator) == {
        "guidance": 1.0,
        **({} if own else {"sampler": repr(expected)}),
    }
    with_labels = replace(generator, classes=3)
    guided = replace(sampling, guidance=2.0).applied(with_labels).sampler
    assert guided == CFG(expected, 2.0)
    with pytest.raises(ValueError, match="--guidance needs prompts or labels"):
        replace(sampling, guidance=2.0).applied(generator)


def test_solvers_of_a_teacher_agree_where_steps_are_many() -> None:
    """With its own 400 steps of Heun; and one step is another thing."""
    for generator in (EDM, FLOW, BETAS):
        fine, found = Sampling(solver="heun", steps=400).applied(generator).sample(range(8)), []
        for solver in ("ddim", "dpm++", "unipc"):
            asked = Sampling(solver=solver, steps=400)  # type: ignore[arg-type]
            found.append(float((asked.applied(generator).sample(range(8)) - fine).abs().max()))
        assert max(found) < 0.03
        rough = Sampling(solver="dpm++", steps=1).applied(generator).sample(range(8))
        assert (rough - fine).abs().max() > 0.3


@pytest.mark.parametrize("flag", [{"solver": "unipc"}, {"schedule": "karras", "steps": 3}])
@pytest.mark.parametrize(
    "student",
    [
        teacher(FewStep(2.5)),
        teacher(FewStep(2.5, 4, "fixed")),
        teacher(FewStep(2.5, 4, "ddim"), method="SiD()"),
        teacher(Jumps(80.0, 2)),
    ],
    ids=lambda student: repr(student.sampler),
)
def test_students_refuse(student: Generator, flag: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="for teachers; this student is sampled by") as caught:
        Sampling(**flag).applied(student)
    assert repr(student.sampler) in str(caught.value)


def test_flags_and_names_of_files() -> None:
    parser = argparse.ArgumentParser()
    sampling_flags(parser)

    def suffix(*args: str) -> str:
        return Sampling.asked(parser.parse_args(args)).suffix

    assert Sampling.asked(parser.parse_args([])) == Sampling()
    assert suffix() == suffix("--guidance", "1") == ""
    assert suffix("--guidance", "7.5") == "-cfg7.5"
    assert suffix("--solver", "dpm++") == "-dpm++"
    assert suffix("--guidance", "2", "--solver", "unipc", "--steps", "9") == "-cfg2-unipc-9steps"
    assert suffix("--steps", "9") == "-9steps"


def test_schedules_of_other_paths() -> None:
    """Noise levels even in the logarithm, or to the power 1/7; from 80 where there is no data."""
    for generator, top in ((FLOW, 80.0), (BETAS, None)):
        path = generator.denoiser.path
        own = generator.sampler
        last = own.ladder(path)[-1] if isinstance(own, FewStep) else 3e-3 / (1 + 2e-3)
        for schedule, power in (("karras", 1 / 7), ("logsnr", 0.0)):
            asked = Sampling(solver="dpm++", steps=6, schedule=schedule)  # type: ignore[arg-type]
            made = asked.applied(generator)
            assert isinstance(made.sampler, MultiStep)
            times = made.sampler.grid(torch.empty(0, dtype=torch.float64))
            levels = path.sigma(times) / path.alpha(times)
            moved = levels**power if power else levels.log()
            gaps = moved.diff()
            assert torch.allclose(gaps, gaps.mean(), rtol=0.02 if top else 0.2)
            assert top is None or float(levels[0]) == pytest.approx(top, rel=1e-4)
            assert float(times[-1]) == pytest.approx(last, rel=1e-4, abs=1e-5)
            assert made.sample(range(3)).isfinite().all()
            assert asked.suffix == f"-dpm++-6steps-{schedule}"


def test_guidance_at_some_noise_levels() -> None:
    labelled = replace(EDM, classes=3)
    asked = Sampling(guidance=2.0, guide_between=(0.28, 2.9))
    assert asked.applied(labelled).sampler == CFG(EDM.sampler, 2.0, 0.28, 2.9)
    assert asked.suffix == "-cfg2@0.28-2.9"
    assert asked.record(labelled) == {"guidance": 2.0, "guide_between": [0.28, 2.9]}
    with pytest.raises(ValueError, match="--guide-between says where --guidance guides"):
        Sampling(guide_between=(0.28, 2.9)).applied(labelled)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a student of two calls, whose teacher is exact."""
    home = tmp_path_factory.mktemp("assist") / "run"
    model = Model(MLP(8, 1), (2,))
    run = Run(SiD(FewStep(2.5, 2)), model, Ring(), steps=1, batch=8)
    for _ in execute(run, home, recipe="mixture"):
        pass
    return home


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("Corrected(0.3)", Corrected(0.3, 1, FewStep(2.5, 2))),
        ("Handover(3)", Handover(3, 1, None, FewStep(2.5, 2))),
        ("Gated(1.0, steps=2)", Gated(1.0, steps=2, sampler=FewStep(2.5, 2))),
    ],
)
def test_the_teacher_helps_its_student(ring: Path, expression: str, expected: Sampler) -> None:
    """On the student's own sampler, with the exact teacher that its run names."""
    student, asked = load_student(ring), Sampling(assist=expression)
    made = asked.applied(student, ring)
    assert made.sampler == expected
    teacher = GaussianMixture.ring(6, 1.0, 0.2)
    x, t = torch.randn(4, 2), torch.full((4,), 0.7)
    assert torch.equal(made.denoiser.teacher(x, t), teacher(x, t))
    assert torch.equal(made.denoiser(x, t), student.denoiser(x, t))
    draws = Draws(torch.arange(3), 0, "sample/")
    z = draws.normal("z", (2,))
    by_hand = expected(Assisted(student.denoiser, teacher), z, None, draws)
    assert torch.equal(made.sample(range(3)), by_hand)
    assert not torch.equal(made.sample(range(3)), student.sample(range(3)))
    assert asked.record(student) == {"guidance": 1.0, "assist": expression}


def test_a_gate_is_calibrated_by_a_share(ring: Path) -> None:
    student = load_student(ring)
    for share in (0.25, 0.75):
        made = Sampling(assist="Gated()", assist_share=share).applied(student, ring)
        assert isinstance(made.sampler, Gated)
        plain, x = student.sample(range(400)), made.sample(range(400))
        assert float((x != plain).any(1).float().mean()) == pytest.approx(share, abs=0.1)


def test_help_that_is_not_there(ring: Path, tmp_path: Path) -> None:
    student = load_student(ring)
    cases: dict[str, tuple[Sampling, Path | None]] = {
        "--assist is one of Corrected, Handover, Gated, got Heun": (
            Sampling(assist="Heun()"),
            ring,
        ),
        "--assist needs the run folder of a student": (Sampling(assist="Handover()"), tmp_path),
        "--assist-share needs --assist": (Sampling(assist_share=0.2), ring),
        "--assist-share needs --assist 'Gated": (
            Sampling(assist="Corrected()", assist_share=0.2),
            ring,
        ),
    }
    for sentence, (asked, home) in cases.items():
        with pytest.raises(ValueError, match=sentence):
            asked.applied(student, home)


def test_help_from_the_command_line(ring: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    for flags in ((), ("--assist", "Handover(4)")):
        done = fewstep("sample", str(ring), "--seeds", "0-2", "--out", str(out), *flags)
        assert done.code == 0, done.err
        x = np.load(out)["x"]
        expected = load_student(ring) if not flags else None
        if expected is not None:
            np.testing.assert_array_equal(x, expected.sample(range(3)).numpy())
    made = Sampling(assist="Handover(4)").applied(load_student(ring), ring).sample(range(3))
    np.testing.assert_array_equal(x, made.numpy())


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs", "runs")
    Path("mine.py").write_text(MINE)
    return tmp_path


def test_a_teacher_is_sampled_and_measured_so(place: Path) -> None:
    """The pictures are those of the sampler, and the result is kept beside that of its own way."""
    own = load_student("runs/teacher")
    assert isinstance(own.sampler, Heun)
    asked = ("--solver", "unipc", "--steps", "5")
    done = fewstep("sample", "runs/teacher", "--seeds", "0-9", "--out", "a.npz", *asked)
    assert (done.code, done.out) == (0, "a.npz\n"), done.err
    expected = replace(own, sampler=MultiStep(own.sampler.times, 5, "unipc"))
    with np.load("a.npz", allow_pickle=False) as stored:
        pictures = to_uint8(expected.sample(range(10)))
        assert np.array_equal(stored["images"], pictures)
    assert not np.array_equal(pictures, to_uint8(own.sample(range(10))))

    np.savez("real.npz", images=to_uint8(own.sample(range(60))).numpy())
    made = fewstep("stats", "real.npz", "--features", "mine.py:Small", "--out", "ref.npz")
    assert made.code == 0, made.err
    measure = ("evaluate", "runs/teacher", "--protocol", "fid50k", "--features", "mine.py:Small")
    measure += ("--reference", "ref.npz", "--samples", "60", "--runs", "1")
    assert fewstep(*measure, *asked).code == 0
    assert fewstep(*measure).code == 0
    home = place / "runs" / "teacher" / "evaluation"
    quick = json.loads((home / "small-60-unipc-5steps.json").read_text())
    plain = json.loads((home / "small-60.json").read_text())
    assert quick["sampler"] == repr(expected.sampler)
    assert "sampler" not in plain
    distance = next(iter(plain["best"]))
    assert quick["best"][distance] > plain["best"][distance]
    assert fewstep("report", "runs/teacher").code == 0
    page = next(Path("runs/teacher").glob("*.html")).read_text()
    assert "Sampled by MultiStep(" in page


def test_wrong_flags_are_one_sentence(place: Path) -> None:
    short = ("sample", "runs/sid", "--seeds", "0")
    for command, message in {
        (*short, "--solver", "unipc"): "--solver and --schedule are for teachers; this",
        (*short, "--solver", "euler"): "--solver is one of heun, ddim, dpm++, unipc, written like",
        ("sample", "runs/teacher", "--steps", "0"): "--steps is from 1 to 10,000, got 0",
        ("evaluate", "runs/sid", "--solver", "heun"): "--solver needs --protocol fid50k, or --pro",
        ("evaluate", "runs/sid", "--steps", "4"): "--steps needs --protocol fid50k, or --prompts",
    }.items():
        done = fewstep(*command)
        assert (done.code, done.out) == (2, ""), (command, done.err)
        assert message in done.err, done.err
        assert len(done.err.splitlines()) == 1
