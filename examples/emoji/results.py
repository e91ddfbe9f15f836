"""The pictures of teacher and students, by stock diffusers in a process of its own, measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.emoji import stock, vae
from examples.emoji.data import views
from examples.emoji.measure import by_prompt, of_words, rounded
from examples.emoji.picture import table
from examples.emoji.stages import STUDENTS, Work
from fewstep.config import parse
from fewstep.diffusion.types import Sampler
from fewstep.storage.files import write_json
from fewstep.teachers.diffusers.load import load_pipeline

SHOWN = (
    *("red apple", "strawberry", "pineapple", "hamburger", "birthday cake", "hot beverage"),
    *("panda", "fox", "penguin", "octopus", "butterfly", "sunflower", "bird", "flower"),
)
"""Prompts of the picture, where they are among those learnt."""
KAPPA = 1.5
"""Guidance scale of the teacher."""
CODED = "through the autoencoder"
DISTANCE, ALIGNMENT = 1.3, 0.05
"""The mark: the four-step student's distance over the teacher's, and how much less aligned."""


def columns(work: Work) -> dict[str, tuple[str, int, float]]:
    """Title -> folder, steps and guidance scale of what is sampled."""
    calls = work.sizes.calls
    return {
        f"teacher, {calls} guided steps": ("pipe", calls, KAPPA),
        "student, one step": ("one-pipe", 1, 0.0),
        "student, four steps": ("four-pipe", 4, 0.0),
    }


def sample(work: Work) -> dict[str, list[Tensor]]:
    """Title -> (named, worded) pictures, `repeats` of every prompt; drawn if need be."""
    jobs: list[str] = []
    for folder, *how in columns(work).values():
        if not (work.out / f"{folder}.npz").is_file():
            jobs += map(str, (work.out / folder, *how))
    if jobs:
        told = [stock.__file__, str(work.prompts), str(work.sizes.repeats), *jobs]
        subprocess.run([sys.executable, *map(str, told)], check=True)
    counts = len(work.emoji.names), len(work.emoji.shared)
    found = {}
    for title, (folder, *_) in columns(work).items():
        with np.load(work.out / f"{folder}.npz", allow_pickle=False) as file:
            found[title] = list(by_prompt(file["images"], *counts))
    return found


def met(few: Mapping[str, float], guided: Mapping[str, float]) -> bool:
    """Whether few steps are as near and as aligned as the mark asks beside the guided teacher."""
    return bool(
        few["fd"] <= DISTANCE * guided["fd"]
        and few["alignment"] >= guided["alignment"] - ALIGNMENT
    )


def measure(work: Work) -> None:
    """Write results.json and pictures.png."""
    emoji, judge = work.emoji, work.judge
    repeats = work.sizes.repeats
    real = torch.stack(views(emoji.pictures, repeats), 1)
    with torch.no_grad():
        decoded = work.vae.decode(vae.encoded(work.vae, real.flatten(0, 1))).sample.clamp(-1, 1)
    decoded = decoded.reshape(real.shape)
    made = {name: [x, of_words(emoji, x[:, 0])] for name, x in (("real", real), (CODED, decoded))}
    teacher = load_pipeline(work.out / "pipe")
    for student in STUDENTS.values():
        plain = replace(teacher, sampler=parse(student.sampler, Sampler))
        made[f"teacher, {student.title}"] = list(judge.draw(plain, repeats))
    made |= sample(work)
    scores = {title: judge.scores(*pictures) for title, pictures in made.items()}
    shown = [text for text in SHOWN if text in emoji.texts] or emoji.texts[:8]
    places = [emoji.texts.index(text) for text in shown]
    drawn = {title: torch.cat([n[:, :2], w[:, :2]])[places] for title, (n, w) in made.items()}
    del drawn[CODED]
    guided, _, four = (scores[title] for title in columns(work))
    plain_four = scores[f"teacher, {STUDENTS['four'].title}"]
    result = {
        "pictures": len(emoji.names),
        "prompts": len(emoji.texts),
        "of_each_prompt": work.sizes.repeats,
        "guidance": KAPPA,
        "scores": {name: rounded(row) for name, row in scores.items()},
        "four_steps_distance_ratio": round(four["fd"] / guided["fd"], 3),
        "four_steps_alignment_gap": round(guided["alignment"] - four["alignment"], 4),
        "mark_met": met(four, guided),
        "mark_met_without_distillation": met(plain_four, guided),
    }
    write_json(work.out / "results.json", result)
    table(drawn, shown, work.out / "pictures.png")
    print(Path(work.out / "results.json").read_text(), flush=True)
