"""Pictures in the page: samples side by side, and the same noise over time, as data URIs."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from fewstep.data.image_grid import grid, is_points, png, scatter
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.model import Model
from fewstep.diffusion.samplers import FewStep, course
from fewstep.diffusion.types import select_rows
from fewstep.domains.domain import Domain
from fewstep.eval.domain_scores import SampleMetrics
from fewstep.eval.gauges import diversity
from fewstep.report.formatting import count as count_of, short
from fewstep.report.plots import moments
from fewstep.report.run_data import RunData, number
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.runner import device_named
from fewstep.runs.teacher import open_generator, teacher_of, with_conditions
from fewstep.storage.model_folder import load_student
from fewstep.storage.user_code import decoded
from fewstep.teachers.diffusers.load import with_text_and_vae
from fewstep.training.progress import report_progress

COLUMNS, ROWS, POINTS = 10, 10, 2000
LOOK_COLUMNS, LOOK_ROWS = 10, (2, 8)
"""How `fewstep.runs.monitor` lays out the pictures it takes: 20 of models with prompts.

80 of others.
"""
MOMENTS = 6
FEW = 8
"""Calls whose times are named."""
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
class Making:
    """How a page makes its pictures."""

    device: str = "cpu"
    teacher: bool = True
    """Whether the teacher's are made; a pipeline's take many calls each."""
    guidance: float = 1.0
    """Scale of the teacher's pictures, of models that take prompts."""

    def __post_init__(self) -> None:
        device_named(self.device)
        CFG(FewStep(), self.guidance)


@dataclass(frozen=True)
class Samples:
    """Fresh samples of every model that could be loaded, and real ones, in the same layout."""

    calls: Mapping[str, str]
    """In words, for each model that could be loaded."""
    size: int
    """Parameters of the run's own model; 0 where it was not loaded."""
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


UNASKED = Making()


def sample(f: RunData, making: Making = UNASKED) -> Samples:
    """Load the model of the run and its teacher; sample both with the same seeds and labels.

    What cannot be loaded is left out, with a note. ValueError where guidance is asked for and the
    model takes no prompts, or the machine has no such device.
    """
    domain, notes = _domain(f)
    if making.guidance != 1 and not f.prompted:
        raise ValueError("--guidance is for models that take prompts; leave it out")
    if f.prompted:
        if domain is None or not f.finished:
            return _none(None, notes)
        return _by_prompts(f, domain, notes, making)
    generators: dict[str, Generator] = {}
    if f.role == "student" and making.teacher:
        try:
            generators |= _teacher(f, domain, making)
        except ValueError as error:
            notes.append(f"The teacher is not shown: {error}.")
    if f.finished:
        generators[f.role] = load_student(f.path, making.device)
    if domain is not None:
        generators = {role: with_conditions(g, domain) for role, g in generators.items()}
    sample_metrics = None
    try:
        sample_metrics = domain.sample_metrics() if domain else None
    except ValueError as error:
        notes.append(f"Real pictures are not shown: {error}.")
    any_one = next(iter(generators.values()), None)
    if any_one is None:
        return _none(sample_metrics, notes)
    if len(any_one.shape) == 3 and any_one.shape[0] == 4:
        notes.append("Latents: three of their four channels are shown as colours, not decoded.")
    count = POINTS if any_one.shape == (2,) else ROWS * COLUMNS
    labels = torch.arange(count) % COLUMNS % any_one.classes if any_one.classes else None
    x = {role: g.sample(range(count), labels).cpu() for role, g in generators.items()}
    spread = {role: diversity(pictures, labels) for role, pictures in x.items()}
    if sample_metrics is not None:
        held_labels = sample_metrics.held_out_labels if any_one.classes else None
        spread["real"] = diversity(sample_metrics.held_out[:POINTS], _first(held_labels, POINTS))
        x["real"] = _arranged(sample_metrics, labels, count)
    last = number(f.last, "diversity")
    spread |= {f.role: last} if last == last else {}
    calls = {role: _in_calls(g) for role, g in generators.items()}
    size = _size(generators[f.role]) if f.finished else 0
    return Samples(calls, size, x, labels, spread, sample_metrics, tuple(notes))


def _in_calls(generator: Generator) -> str:
    """How it is sampled, in words: "4 calls, at t = 80, 9.2, 1.6, 0.3"; of many calls how many."""
    calls = count_of(generator.sampler.calls, "call")
    if generator.sampler.calls > FEW:
        return calls
    times = course(generator.sampler, generator.denoiser.path).times
    return f"{calls}, at t = {', '.join(short(t) for t in times)}"


def _none(sample_metrics: SampleMetrics | None, notes: Sequence[str]) -> Samples:
    return Samples({}, 0, {}, None, {}, sample_metrics, tuple(notes))


def _size(generator: Generator) -> int:
    net: nn.Module = generator.denoiser
    return sum(p.numel() for p in net.parameters())


def _by_prompts(f: RunData, domain: Domain, notes: Sequence[str], making: Making) -> Samples:
    """A row of seeds for each of the first prompts, if prompts and encoders are still there.

    One model after the other, since two large ones do not fit side by side.
    """
    student = load_student(f.path, making.device)
    size, calls = _size(student), {f.role: _in_calls(student)}
    x = {}
    try:
        prompts = domain.shown(PROMPTS)
        texts = [prompt for prompt in prompts for _ in range(SEEDS)]
        x[f.role] = _of_prompts(student, texts, 0, 1 + making.teacher)
    except ValueError as error:
        missing = f"Pictures are not shown: {error}."
        return Samples(calls, size, {}, None, {}, None, (*notes, missing))
    model = student.model
    del student
    rows = "; ".join(f"“{prompt}”" for prompt in prompts)
    notes = [*notes, f"The rows' prompts, from the top: {rows}."]
    try:
        shown = _teacher(f, domain, making, model) if making.teacher else {}
        for role, teacher in shown.items():
            scale, sampler = "without guidance", teacher.sampler
            if making.guidance != 1:
                scale, sampler = f"guidance {making.guidance:g}", CFG(sampler, making.guidance)
            x[role] = _of_prompts(replace(teacher, sampler=sampler), texts, 1, 2)
            calls[role] = f"{count_of(sampler.calls, 'call')}, {scale}"
    except ValueError as error:
        notes.append(f"The teacher is not shown: {error}.")
    return Samples(calls, size, x, None, {}, None, tuple(notes), SEEDS)


def _of_prompts(generator: Generator, texts: Sequence[str], before: int, models: int) -> Tensor:
    """A picture of each text, of the seeds 0, 1, ..., by a model after so many others of all."""
    speaking = with_text_and_vae(generator)
    assert speaking.text is not None
    cond, count, parts = speaking.text(texts), len(texts), []
    for part in torch.arange(count).split(SEEDS):
        here = select_rows(cond, part, speaking.device)
        parts.append(speaking.sample(part.tolist(), cond=here).cpu())
        report_progress("pictures", before * count + SEEDS * len(parts), models * count)
    speaking.release()
    return torch.cat(parts)


def _domain(f: RunData) -> tuple[Domain | None, list[str]]:
    try:
        domain: Domain = decoded(f.run.get("domain"), Domain, f.path)
    except ValueError as error:
        which = "Pictures" if f.prompted else "Real pictures"
        return None, [f"{which} are not shown: {error}."]
    return domain, []


def _teacher(
    f: RunData, domain: Domain | None, making: Making, model: Model | None = None
) -> dict[str, Generator]:
    where = f.facts.get("teacher")
    exact = (
        open_generator(teacher_of(RunFolder(f.path)), making.device, model)
        if where
        else domain.exact()
        if domain
        else None
    )
    if exact is not None and domain is not None:
        exact = domain.prepared(with_text_and_vae(exact))
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
    flat = [x for x in s.x.values() if is_points(x)]
    if flat:
        extent = 1.1 * max(float(x.abs().quantile(0.999)) for x in flat)
    out = []
    for role in ("teacher", "student", "real"):
        if role not in s.x:
            continue
        x, note = s.x[role], s.calls.get(role, "")
        if is_points(x):
            image = Image.fromarray(scatter(x, 480, extent)[..., 0])
            alt = f"{TITLES[role]}: {len(x):,} points in the plane"
        else:
            image = grid(x, columns=s.columns)
            alt = f"{TITLES[role]}: {len(x)} pictures in {s.columns} columns"
        out.append(picture(image, TITLES[role], alt, note))
    return out


def strips(film: list[Picture]) -> bool:
    """Whether the pictures are long rows, to be put one below the other."""
    return all(p.width > 3 * p.height for p in film)


def column_labels(s: Samples) -> list[int]:
    """The label of each column of the grids, none for models without labels."""
    if s.labels is None or any(map(is_points, s.x.values())):
        return []
    columns: list[int] = s.labels[:COLUMNS].tolist()
    whole = all(int(s.labels[i]) == columns[i % COLUMNS] for i in range(len(s.labels)))
    return columns if whole else []


FRAMES, FRAME_BYTES = 24, 4_000_000
"""Moments that the slider of a report has at most, and the size of their pictures."""


@dataclass(frozen=True)
class Frame:
    """One moment of the slider: its step, and where its picture is."""

    step: int
    uri: str
    width: int
    height: int


def not_made(f: RunData) -> Samples:
    """No samples at all, with the reason, where no model is read."""
    fresh = f"Fresh samples and the teacher's: fewstep report {f.path}"
    return _none(None, [fresh] if f.finished else [])


def looks(path: Path) -> list[tuple[int, Path]]:
    """The pictures taken on the way, by step."""
    matches = (
        (re.fullmatch(r"step-(\d+)\.png", p.name), p)
        for p in sorted((path / "grids").glob("step-*.png"))
    )
    return [(int(match[1]), p) for match, p in matches if match]


def frames(f: RunData, live: bool) -> list[Frame]:
    """The moments of the slider: all of them where they are served, else some, in the page."""
    taken = looks(f.path)
    if not live:
        taken = _chosen(taken)
    out = []
    for step, path in taken:
        uri = f"/grid/{step}.png"
        try:
            with Image.open(path) as opened:
                if not live:
                    opened.load()
                    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
                out.append(Frame(step, uri, *opened.size))
        except (OSError, UnidentifiedImageError):
            continue
    return out


def _chosen(taken: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """As many moments as a page of a bearable size can hold."""
    most = FRAMES
    while most > 1:
        chosen = [taken[i] for i in moments(len(taken), most)]
        if sum(path.stat().st_size for _, path in chosen) <= FRAME_BYTES:
            return chosen
        most //= 2
    return []


def film(f: RunData) -> list[Picture]:
    """Samples of the same noise at up to six steps, two rows of each grid in one line."""
    grids = looks(f.path)
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
