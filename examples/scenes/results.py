"""The table: real pictures, the teacher in many and in few steps, and the students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from examples.scenes import vae
from examples.scenes.picture import TITLES, shown, table
from examples.scenes.scores import FLOOR, Exam
from examples.scenes.stages import CHECKED, Work
from examples.scenes.students import STUDENTS
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.samplers import FewStep, MultiStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Sampler
from fewstep.storage.files import read_json, write, write_json
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.load import load_pipeline

KAPPA = 2.0
"""Guidance scale of the teacher."""
FEW = 4
ASKED = {"four": (1.2, 0.5), "one": (1.5, 0.6)}
"""Student -> the most that its excess may be of that of all guided steps, and of few."""
NUMBERS = 10_000
"""Number of the first sample, whose noise no other look has."""


def ddim(steps: int) -> FewStep:
    """Even timesteps from the last one."""
    return FewStep(999.0, steps, "ddim", unit=True)


def dpm(steps: int, path: NoisePath) -> MultiStep:
    """DPM-Solver++(2M) at DDIM's timesteps."""
    return MultiStep(Discrete(tuple(sorted(ddim(steps).ladder(path)))), steps, "dpm++")


def solvers(calls: int, path: NoisePath) -> dict[str, Sampler]:
    """Name -> how the undistilled teacher is sampled, what is cheap first."""
    found: dict[str, Sampler] = {}
    for steps in (1, FEW, calls):
        plain: dict[str, Sampler] = {"ddim": ddim(steps)}
        if steps == FEW:
            plain["dpm"] = dpm(steps, path)
        for kind, sampler in plain.items():
            found[f"{kind} {steps}"] = sampler
            found[f"{kind} {steps} guided"] = CFG(sampler, KAPPA)
    return found


def exam(work: Work) -> Exam:
    """Captions that are reported on, as many pictures as `Sizes.samples`."""
    each = work.sizes.samples // 4
    parts = work.stream.split
    return Exam(
        work.judge,
        work.stream.objects,
        parts.seen[:each],
        parts.unseen[:each],
        reference=work.sizes.reference,
    )


def sampled(work: Work, generator: Generator, asked: Exam, name: str) -> Tensor:
    """Pictures of the exam's captions, drawn if need be: (N, 3, 32, 32)."""
    file = samples_of(work, name)
    if not file.is_file():
        print(f"sampling: {name}", flush=True)
        x = made(generator, asked, range(len(asked.captions)))
        file.parent.mkdir(exist_ok=True)
        write(file, save({"x": x.contiguous()}))
    return load_file(file)["x"]


def samples_of(work: Work, name: str) -> Path:
    """The file of a row's pictures."""
    return work.out / "samples" / f"{name.replace(' ', '-')}.safetensors"


def made(generator: Generator, asked: Exam, rows: Sequence[int]) -> Tensor:
    """Pictures of these of the exam's captions: (len(rows), 3, 32, 32)."""
    assert generator.text is not None
    cond = generator.text([asked.captions[row].text for row in rows])
    return generator.sample([NUMBERS + row for row in rows], batch=100, cond=cond).clamp(-1, 1)


def generators(work: Work) -> dict[str, Generator]:
    """Name -> what is sampled: the teacher by its solvers, and the students that are there."""
    teacher = load_pipeline(work.out / "pipe")
    path = teacher.denoiser.path
    found = {
        name: replace(teacher, sampler=sampler)
        for name, sampler in solvers(work.sizes.calls, path).items()
    }
    for name in STUDENTS:
        if (work.out / name / "student").is_dir():
            student = load_student(work.out / name)
            found[name] = replace(teacher, denoiser=student.denoiser, sampler=student.sampler)
    return found


def measure(work: Work) -> None:
    """Write results.json and pictures.png; scores that are there are kept."""
    asked = exam(work)
    home, rows = work.out / "scores", shown(asked)
    home.mkdir(exist_ok=True)
    real = asked.real(FLOOR)
    coded = vae.decoded(work.vae, vae.encoded(work.vae, real))
    scores = {
        name: rounded(asked.scores(x)) for name, x in (("real", real), ("autoencoder", coded))
    }
    pictures: dict[str, Tensor] = {"real": real[rows]}
    for name, generator in generators(work).items():
        file, drawn = home / f"{name.replace(' ', '-')}.json", samples_of(work, name)
        if not file.is_file():
            write_json(file, rounded(asked.scores(sampled(work, generator, asked, name))))
            print(f"{name}: {read_json(file)}", flush=True)
        scores[name] = read_json(file)
        if name in TITLES:
            there = drawn.is_file()
            pictures[name] = load_file(drawn)["x"][rows] if there else made(generator, asked, rows)
    for name in STUDENTS:  # of a run that is not here any more
        if name not in scores and (home / f"{name}.json").is_file():
            scores[name] = read_json(home / f"{name}.json")
    write_json(work.out / "results.json", summary(work, scores))
    table(pictures, asked, work.out / "pictures.png")


def summary(work: Work, scores: dict[str, Any]) -> dict[str, Any]:
    """All scores, what they were made by, and the marks."""
    sizes = work.sizes
    x = work.stream.pictures(CHECKED, 500)
    found = {
        "psnr": round(vae.psnr(work.vae, x), 2),
        "samples": sizes.samples,
        "teacher_steps": sizes.teacher_steps,
        "students": {
            name: {
                **{"title": s.title, "calls": s.calls, "method": s.method, "steps": s.steps},
                **{"rate": s.rate, "pictures": s.pictures, "after": s.after},
            }
            for name, s in STUDENTS.items()
        },
        "student_batch": sizes.student_batch,
        "guidance": KAPPA,
        "scores": scores,
    }
    return found | {"marks": marks(found, sizes.calls)}


def marks(found: dict[str, Any], calls: int) -> dict[str, Any]:
    """What was asked for, by name: the value, and whether it is met."""
    scores = found["scores"]
    guided, plain = scores[f"ddim {calls} guided"], scores[f"ddim {calls}"]
    few = [row for name, row in scores.items() if f" {FEW}" in name and name[0] == "d"]
    best = min(row["excess"] for row in few)
    unguided = min(row["excess"] for name, row in scores.items() if name in ("ddim 4", "dpm 4"))
    told = {
        "autoencoder": (found["psnr"], found["psnr"] >= 30),
        "teacher_seen": (guided["all_seen"], guided["all_seen"] >= 0.80),
        "teacher_unseen": (guided["all_unseen"], guided["all_unseen"] >= 0.65),
        "task": (unguided / plain["excess"], unguided >= 2 * plain["excess"]),
    }
    for name, (most, share) in ASKED.items():
        if name not in scores:
            continue
        row = scores[name]
        told |= {
            f"{name}_to_teacher": (
                row["excess"] / guided["excess"],
                row["excess"] <= most * guided["excess"],
            ),
            f"{name}_to_undistilled": (row["excess"] / best, row["excess"] <= share * best),
            f"{name}_seen": (
                guided["all_seen"] - row["all_seen"],
                row["all_seen"] >= guided["all_seen"] - 0.05,
            ),
            f"{name}_unseen": (
                guided["all_unseen"] - row["all_unseen"],
                row["all_unseen"] >= guided["all_unseen"] - 0.05,
            ),
            f"{name}_sharpness": (row["sharpness"], 0.9 <= row["sharpness"] <= 1.15),
        }
    return {
        name: {"value": float(f"{value:.4g}"), "met": "yes" if met else "no"}
        for name, (value, met) in told.items()
    }


def rounded(row: dict[str, float]) -> dict[str, float]:
    """Four digits of each score."""
    return {name: float(f"{value:.4g}") for name, value in row.items()}
