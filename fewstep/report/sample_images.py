"""Pictures in the page: samples side by side, and the same noise over time, as data URIs."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fewstep.data.image_grid import grid, png, scatter
from fewstep.diffusion.generator import Generator
from fewstep.domains.domain import Domain
from fewstep.eval.domain_scores import SampleMetrics
from fewstep.eval.gauges import diversity
from fewstep.report.plots import moments
from fewstep.report.run_data import RunData, number
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.teacher import teacher_of
from fewstep.storage.model_folder import load_student
from fewstep.storage.user_code import decoded
from fewstep.teachers.diffusers.folder import is_pipeline
from fewstep.teachers.diffusers.load import with_text_and_vae
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.teachers.snapshots import load_model_or_snapshot

COLUMNS, ROWS, POINTS = 10, 10, 2000
LOOK_COLUMNS, LOOK_ROWS = 10, (2, 8)
"""How `fewstep.runs.monitor` lays out the pictures it takes: 20 of models with prompts.

80 of others.
"""
MOMENTS = 6
PROMPTS, SEEDS = 4, 4
"""Rows and columns of the pictures of a model that takes prompts."""


@dataclass(frozen=True)
class Picture:
    """A picture in the page."""

    uri: str
    width: int
    height: int
    title: str
    alt: str
    note: str = ""


@dataclass(frozen=True)
class Samples:
    """Fresh samples of every model that could be loaded, and real ones, in the same layout."""

    generators: Mapping[str, Generator]
    x: Mapping[str, Tensor]
    labels: Tensor | None
    """The label of sample i: (N,)."""
    diversity: Mapping[str, float]
    sample_metrics: SampleMetrics | None
    notes: tuple[str, ...] = ()
    """What is missing, and why."""
    columns: int = COLUMNS


def picture(image: Image.Image, title: str, alt: str, note: str = "") -> Picture:
    """`image` as a data URI."""
    uri = "data:image/png;base64," + base64.b64encode(png(image)).decode()
    return Picture(uri, image.width, image.height, title, alt, note)


def sample(f: RunData) -> Samples:
    """Load the model of the run and its teacher; sample both with the same seeds and labels."""
    domain, notes = _domain(f)
    generators: dict[str, Generator] = {}
    if f.role == "student":
        try:
            generators |= _teacher(f, domain)
        except ValueError as error:
            notes.append(f"The teacher is not shown: {error}.")
    if f.finished:
        generators[f.role] = load_student(f.path)
    sample_metrics = None
    try:
        sample_metrics = domain.sample_metrics() if domain else None
    except ValueError as error:
        notes.append(f"Real pictures are not shown: {error}.")
    any_one = next(iter(generators.values()), None)
    if any_one is None:
        return Samples({}, {}, None, {}, sample_metrics, tuple(notes))
    if domain is not None and is_prompted(any_one):
        return _by_prompts(generators, domain, notes)
    if any_one.shape[0] == 4:
        notes.append("Latents: three of their four channels are shown as colours, not decoded.")
    count = ROWS * COLUMNS if len(any_one.shape) == 3 else POINTS
    labels = torch.arange(count) % COLUMNS % any_one.classes if any_one.classes else None
    x = {role: g.sample(range(count), labels) for role, g in generators.items()}
    spread = {role: diversity(pictures, labels) for role, pictures in x.items()}
    if sample_metrics is not None:
        held_labels = sample_metrics.held_out_labels if any_one.classes else None
        spread["real"] = diversity(sample_metrics.held_out[:POINTS], _first(held_labels, POINTS))
        x["real"] = _arranged(sample_metrics, labels, count)
    last = number(f.last, "diversity")
    spread |= {f.role: last} if last == last else {}
    return Samples(generators, x, labels, spread, sample_metrics, tuple(notes))


def _by_prompts(generators: Mapping[str, Generator], domain: Domain, notes: list[str]) -> Samples:
    """A row of seeds for each of the first prompts, if prompts and encoders are still there."""
    try:
        prompts = domain.shown(PROMPTS)
        speaking = {role: with_text_and_vae(g) for role, g in generators.items()}
    except ValueError as error:
        missing = f"Pictures are not shown: {error}."
        return Samples(generators, {}, None, {}, None, (*notes, missing))
    texts = [prompt for prompt in prompts for _ in range(SEEDS)]
    x = {}
    for role, g in speaking.items():
        assert g.text is not None
        x[role] = g.sample(range(len(texts)), batch=SEEDS, cond=g.text(texts))
    rows = "; ".join(f"“{prompt}”" for prompt in prompts)
    notes = [*notes, f"The rows' prompts, from the top: {rows}."]
    return Samples(speaking, x, None, {}, None, tuple(notes), SEEDS)


def is_prompted(generator: Generator) -> bool:
    """Whether a model takes prompts."""
    return generator.model is not None and isinstance(generator.model.net, DiffusersNet)


def _domain(f: RunData) -> tuple[Domain | None, list[str]]:
    try:
        domain: Domain = decoded(f.run.get("domain"), Domain, f.path)
    except ValueError as error:
        return None, [f"Real pictures are not shown: {error}."]
    return domain, []


def _teacher(f: RunData, domain: Domain | None) -> dict[str, Generator]:
    where = f.facts.get("teacher")
    if where and is_pipeline(where):
        raise ValueError(
            f"sampling a pipeline takes many calls a picture; 'fewstep sample {where} --prompts "
            "...' does"
        )
    exact = (
        load_model_or_snapshot(teacher_of(RunFolder(f.path)))
        if where
        else domain.exact()
        if domain
        else None
    )
    return {} if exact is None else {"teacher": exact}


def _first(labels: Tensor | None, count: int) -> Tensor | None:
    return None if labels is None else labels[:count]


def _arranged(sample_metrics: SampleMetrics, labels: Tensor | None, count: int) -> Tensor:
    """Held-out pictures in the order of `labels`; a label that runs out starts again."""
    pictures = sample_metrics.held_out
    if labels is None:
        return pictures[:count]
    places = {
        int(c): (sample_metrics.held_out_labels == c).nonzero()[:, 0] for c in labels.unique()
    }
    taken: dict[int, int] = dict.fromkeys(places, 0)
    rows = []
    for label in labels.tolist():
        if len(places[label]):
            rows.append(int(places[label][taken[label] % len(places[label])]))
            taken[label] += 1
    return pictures[rows]


TITLES = {"teacher": "Teacher", "student": "Student", "real": "Real, held out"}


def side_by_side(s: Samples) -> list[Picture]:
    """One grid for each of teacher, student and real data."""
    extent = None
    flat = [x for x in s.x.values() if x.ndim == 2]
    if flat:
        extent = 1.1 * max(float(x.abs().quantile(0.999)) for x in flat)
    out = []
    for role in ("teacher", "student", "real"):
        if role not in s.x:
            continue
        x, made = s.x[role], s.generators.get(role)
        note = f"{made.sampler.calls:,} call{'s' * (made.sampler.calls != 1)}" if made else ""
        if x.ndim == 2 and x.shape[1] == 2:
            image = Image.fromarray(scatter(x, 480, extent)[..., 0])
            alt = f"{TITLES[role]}: {len(x):,} points in the plane"
        elif x.ndim == 4 and x.shape[1] in (1, 3):
            image = grid(x, columns=s.columns)
            alt = f"{TITLES[role]}: {len(x)} pictures in {s.columns} columns"
        else:
            continue
        out.append(picture(image, TITLES[role], alt, note))
    return out


def strips(film: list[Picture]) -> bool:
    """Whether the pictures are long rows, to be put one below the other."""
    return all(p.width > 3 * p.height for p in film)


def column_labels(s: Samples) -> list[int]:
    """The label of each column of the grids, none for models without labels."""
    if s.labels is None or any(x.ndim != 4 for x in s.x.values()):
        return []
    columns: list[int] = s.labels[:COLUMNS].tolist()
    whole = all(int(s.labels[i]) == columns[i % COLUMNS] for i in range(len(s.labels)))
    return columns if whole else []


def film(f: RunData) -> list[Picture]:
    """Samples of the same noise at up to six steps, two rows of each grid in one line."""
    grids: list[tuple[int, Path]] = []
    for path in sorted((f.path / "grids").glob("step-*.png")):
        if match := re.fullmatch(r"step-(\d+)\.png", path.name):
            grids.append((int(match[1]), path))
    out = []
    images = {number(line, "step"): number(line, "images") for line in f.log}
    for place in moments(len(grids), MOMENTS):
        step, path = grids[place]
        try:
            with Image.open(io.BytesIO(path.read_bytes())) as opened:
                strip = _strip(opened.convert("L" if opened.mode == "L" else "RGB"))
        except (OSError, UnidentifiedImageError):
            continue
        seen = images.get(step)
        note = "before training" if step == 0 else f"{seen:,.0f} images" if seen else ""
        alt = f"Samples of the same noise after step {step:,}"
        out.append(picture(strip, f"step {step:,}", alt, note))
    return out


def _strip(image: Image.Image) -> Image.Image:
    """The first two rows of a look side by side; another kind of picture as it is."""
    gap = 4
    wide, high = image.width - gap, image.height - gap
    if min(wide, high) < LOOK_COLUMNS or wide % LOOK_COLUMNS:
        return image
    side = wide // LOOK_COLUMNS
    rows = min(LOOK_ROWS, key=lambda rows: abs(math.log(high / rows / side)))  # nearest to squares
    if high % rows:
        return image
    step = high // rows
    row: dict[str, Any] = {"mode": image.mode, "size": (2 * wide + gap, step + gap)}
    strip = Image.new(**row)
    strip.paste(image.crop((0, 0, wide, step + gap)), (0, 0))
    strip.paste(image.crop((0, step, image.width, 2 * step + gap)), (wide, 0))
    return strip
