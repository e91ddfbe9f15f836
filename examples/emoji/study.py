"""The guidance study: one-step students that differ in their four scales alone.

Long and short guidance buys alignment with diversity (Zhou et al. 2024,
https://arxiv.org/abs/2406.01561); Zero-CFG and Anti-CFG need no guided teacher (Zhou et al. 2025,
https://arxiv.org/abs/2505.12674). Each student is scored at a few steps on the way.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.emoji.measure import rounded
from examples.emoji.stages import STUDENTS, Work
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Whole
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.guidance_scales import LSG, AntiCFG, Guidance, Unguided, ZeroCFG
from fewstep.domains.prompts import conditioned
from fewstep.losses.weight import Power
from fewstep.methods.sid import SiD
from fewstep.storage.files import read_json, write_json
from fewstep.teachers.diffusers.load import load_pipeline
from fewstep.training.ema import EMA
from fewstep.training.loop import train
from fewstep.training.optim import Optim

CHOICES: dict[str, Guidance] = {
    "LSG 1.5": LSG(1.5),
    "LSG 3": LSG(3.0),
    "Zero-CFG": ZeroCFG(),
    "Anti-CFG": AntiCFG(-1.0),
    "unguided": Unguided(),
}


def conduct(work: Work) -> None:
    """Train what is missing; study.json gathers all so far."""
    teacher = load_pipeline(work.out / "pipe")
    folder = work.out / "study"
    folder.mkdir(exist_ok=True)
    found = {}
    for name, guidance in CHOICES.items():
        path = folder / f"{name.replace(' ', '-')}.json"
        if not path.is_file():
            print(f"guidance study: {name}", flush=True)
            write_json(path, trial(work, teacher, guidance))
        found[name] = read_json(path)
        write_json(work.out / "study.json", {"steps": work.sizes.study_steps, "students": found})


def trial(work: Work, teacher: Generator, guidance: Guidance) -> dict[str, Any]:
    """A student's scores, halfway and at the end."""
    steps, batch = work.sizes.study_steps, work.sizes.batch
    cache = Path(f"{work.prompts}.embeddings")
    source = conditioned(work.emoji.texts, cache, teacher, teacher.shape)
    times = Whole(20, 979)
    method = SiD(FewStep(625.0), 1.0, times, fake=FakeScore(times, Power(2, -2)))
    curve: dict[str, Any] = {}
    for record in train(
        replace(method, guidance=guidance),
        teacher.denoiser,
        teacher.denoiser,
        source,
        batch=batch,
        steps=steps,
        optim=Optim(STUDENTS["one"].lr, (0.0, 0.99), warmup=20, decay="linear"),
        ema=EMA(halflife=20 * batch),
    ):
        if record.step in (steps // 2, steps):
            student = replace(teacher, denoiser=record.state.average, sampler=method.sampler)
            drawn = work.judge.draw(student, work.sizes.repeats)
            curve[str(record.step)] = rounded(work.judge.scores(*drawn))
            print(f"  {record.step:5} {curve[str(record.step)]}", flush=True)
    return {"method": repr(replace(method, guidance=guidance)), "batch": batch, "curve": curve}
