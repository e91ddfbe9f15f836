"""The model card that goes with every export: README.md in a folder, OUT.md beside a file.

It says where the student comes from, under which licence, how it was made and how it is sampled,
what was measured, and how it is used. What is not known is said to be unknown.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fewstep
from fewstep.config import parse
from fewstep.data.prompts import read_prompts
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.samplers import FewStep, course
from fewstep.distillation.method import Method
from fewstep.report.formatting import count, short
from fewstep.report.run_data import RunData, number, read_run, whole
from fewstep.storage.files import digest
from fewstep.teachers.diffusers.hub import name_of
from fewstep.teachers.diffusers.load import pipeline_card

LICENCE_KEYS = ("license", "license_name", "license_link")
"""What the front matter of a published model says of its licence."""
NAMELESS = "a teacher trained by fewstep"
UNKNOWN = "unknown: the teacher's, see there"
ELSEWHERE = frozenset({"what", "sampler", "classes", "card"})
"""Facts of a program that the card tells in its own words."""


def card(
    student: Generator,
    run: Path,
    use: str,
    facts: Mapping[str, Any],
    front: Mapping[str, str] | None = None,
    picture: tuple[str, str] | None = None,
) -> str:
    """The card of a student that was exported from `run`.

    use: Python that samples what was exported; facts: more rows of the first table, such as the
    inputs of a program, as text or in JSON, but for `ELSEWHERE` and None; front: more of the front
    matter; picture: (prompt, file beside the card) of a picture to show, "" for no prompt.
    """
    name = teacher_name(student)
    licence = licences(student)
    head = dict(front or {})
    if "/" in name:  # ORG/NAME: the hub refuses what it cannot look up
        head["base_model"] = name
    head.setdefault("base_model_relation", "finetune")
    head |= {key: value for key, value in licence.items() if key in LICENCE_KEYS}
    head["tags"] = f"[{', '.join(tags(student, head))}]"
    places = homes(run)
    data = read_run(places[0]) if places else None
    rows = [*_facts(student, data), *_more(facts), ("licence", _licence(licence))]
    return "\n".join(
        [
            "---",
            *(f"{key}: {value}" for key, value in head.items()),
            *_widget(picture),
            "---",
            f"# {headline(student)}",
            "",
            *_shown(picture),
            f"Distilled from `{name}` and exported by fewstep {fewstep.__version__}.",
            "",
            *_table(("", ""), rows),
            "",
            f"```python\n{use.strip()}\n```",
            "",
            *_measured(data if places[:1] == [run] else None),
            *_cited(student),
        ]
    )


def headline(student: Generator) -> str:
    """What a student is called: its teacher's name, and its steps."""
    steps = len(course(student.sampler, student.denoiser.path).times)
    return f"{teacher_name(student)} in {count(steps, 'step')}"


def homes(run: Path) -> list[Path]:
    """The folder of the run that a model is from: itself, or above it, of one such as best/."""
    return [home for home in (run, run.parent) if (home / "run.json").is_file()]


FAMILY_TAGS = {
    "StableDiffusionPipeline": "stable-diffusion",
    "StableDiffusionXLPipeline": "stable-diffusion-xl",
    "StableDiffusion3Pipeline": "sd3",
    "SanaPipeline": "sana",
    "FluxPipeline": "flux",
}
"""Pipeline -> the tag that diffusers' own training scripts give to its fine-tunes."""


def tags(student: Generator, front: Mapping[str, str]) -> list[str]:
    """The tags of a card with this front matter, by which the hub lists models."""
    found = []
    pipeline = pipeline_card(student.card).get("pipeline")
    if pipeline:
        found += ["text-to-image"]
        found += ["diffusers"] if front.get("library_name") == "diffusers" else []
        found += [FAMILY_TAGS[pipeline]] if pipeline in FAMILY_TAGS else []
    if front.get("base_model_relation") == "adapter":
        found += ["lora", "template:sd-lora"]
    return [*found, "few-step", "distillation"]


def _widget(picture: tuple[str, str] | None) -> list[str]:
    """The lines of the front matter that the hub's gallery is filled with."""
    if picture is None or not picture[0]:
        return []
    prompt, file = (json.dumps(text, ensure_ascii=False) for text in picture)
    return ["widget:", f"- text: {prompt}", "  output:", f"    url: {file}"]


def _shown(picture: tuple[str, str] | None) -> list[str]:
    """The picture in the text: the hub's gallery shows what has a prompt."""
    if picture is None:
        return []
    prompt, file = picture
    return ["<Gallery />" if prompt else f"![samples]({quote(file)})", ""]


def teacher_name(student: Generator) -> str:
    """What the first teacher is called: its name on the hub, else its folder or snapshot."""
    first = _first(student.card)
    if "folder" in first:
        folder = Path(str(first["folder"]))
        return name_of(folder) or folder.name
    source = first.get("source")
    file = source.get("file") if isinstance(source, Mapping) else None
    return str(file or NAMELESS)


def _first(card: Mapping[str, Any]) -> Mapping[str, Any]:
    """The card at the end of the line of teachers."""
    while isinstance(card.get("teacher"), dict):
        card = card["teacher"]
    return card


def licences(student: Generator) -> dict[str, str]:
    """The licence that the teacher's folder or card states, by the keys of a front matter.

    {"licence": ...} where it is a sentence; nothing where it is not known.
    """
    origin = pipeline_card(student.card)
    if "folder" in origin:
        return _front_matter(Path(str(origin["folder"])) / "README.md")
    stated = _first(student.card).get("licence")
    return {"licence": str(stated)} if stated else {}


def _front_matter(path: Path) -> dict[str, str]:
    """The lines about the licence at the head of a model card, as they stand there."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace")[:4000].splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    fields: dict[str, str] = {}
    for line in lines[1:]:
        if line.strip() == "---":
            break
        key, colon, value = line.partition(":")
        if colon and key in LICENCE_KEYS and value.strip():
            fields[key] = value.strip()
    return fields


def _licence(licence: Mapping[str, str]) -> str:
    return ", ".join(licence.values()) + " (the teacher's)" if licence else UNKNOWN


def _facts(student: Generator, found: RunData | None) -> Iterator[tuple[str, str]]:
    """How it is sampled and how it was made, in the run `found`."""
    card, sampler = student.card, student.sampler
    path, run = student.denoiser.path, course(sampler, student.denoiser.path)
    times = ", ".join(f"{t:g}" for t in run.times)
    yield "steps", f"{len(run.times)}, at t = {times} of {type(path).__name__}"
    factor = "" if run.start == 1 else f", which is multiplied by {run.start:.5g}"
    yield "starts from", f"standard normal z of {list(student.shape)}{factor}"
    guidance = "none at sampling: it is in the weights"
    if isinstance(sampler, CFG):
        guidance = (
            f"at scale {sampler.kappa:g}, part of the sampler: {sampler.calls} network calls"
        )
        sampler = sampler.sampler
    if len(run.times) > 1:
        few = sampler if isinstance(sampler, FewStep) else None
        yield "between steps", f"noise is {_NOISE[few.noise]}" if few else f"`{sampler}`"
    yield "guidance", guidance
    if student.classes:
        yield "classes", f"0 to {student.classes - 1}; {student.classes} for none"
    if card.get("method"):
        yield "method", f"`{card['method']}`"
    if (method := _method(card)) is not None:
        yield "data", "real pictures" if method.needs_data else f"none: noise and {_heard(found)}"
    if "images" in card:
        yield "training", f"{whole(card, 'images'):,} samples in {whole(card, 'steps'):,} steps"


def _heard(found: RunData | None) -> str:
    """The conditions of a run without data; prompts are counted where their file is as it was."""
    domain = found.run.get("domain") if found else None
    if not isinstance(domain, Mapping) or domain.get("type") != "Prompts":
        return "conditions alone"
    file = Path(str(domain.get("file")))
    same = file.is_file() and digest(file) == domain.get("sha256")
    return (f"{len(read_prompts(file))} " if same else "the ") + f"prompts of {file.name}"


_NOISE = {
    "fresh": "drawn anew",
    "fixed": "that of the start again",
    "ddim": "what the last step found",
}


def _more(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a file says of itself that the card does not say elsewhere."""
    for key, value in facts.items():
        if value is not None and key not in ELSEWHERE:
            yield key, value if isinstance(value, str) else f"`{json.dumps(value)}`"


def _method(card: Mapping[str, Any]) -> Method | None:
    """The student's method, where it is one of the package."""
    try:
        method: Method = parse(str(card.get("method", "")), Method)
    except ValueError:
        return None
    return method


_GUIDANCE = {
    **dict.fromkeys(
        ("LSG", "RandomLSG"),
        "Long and short guidance (Zhou et al. 2024), https://arxiv.org/abs/2406.01561.",
    ),
    **dict.fromkeys(
        ("ZeroCFG", "AntiCFG"),
        "Zero-CFG and Anti-CFG (Zhou et al. 2025), https://arxiv.org/abs/2505.12674.",
    ),
}
"""The papers of `fewstep.diffusion.guidance`."""


def _cited(student: Generator) -> list[str]:
    """The papers of the method, which is the first line of its module, and of its guidance."""
    method = _method(student.card)
    if method is None:
        return []
    first = (sys.modules[type(method).__module__].__doc__ or "").strip().partition("\n")[0]
    guided = re.search(r"\bguidance=(\w+)\(", str(student.card["method"]))
    more = _GUIDANCE.get(guided[1], "") if guided else ""
    return ["## Method", "", first, *([more] if more else []), ""]


def _measured(found: RunData | None) -> list[str]:
    """The figures of `fewstep evaluate` for the model as it is."""
    if found is None:
        return []
    blocks = [
        _scores(found),
        *(_evaluation(e) for e in found.evaluations.values() if found.still(e)),
    ]
    lines = [line for block in blocks for line in block]
    return ["## Measured", "", *lines] if lines else []


def _scores(found: RunData) -> list[str]:
    """metrics.json: real data, teacher and student beside each other."""
    roles = [role for role in ("real", "teacher", "student") if role in found.metrics]
    if "student" not in roles:
        return []
    names = [n for n in found.metrics["student"] if not n.endswith("_std") and n != "draws"]
    rows = [
        (name, *(short(found.metrics[role].get(name, float("nan"))) for role in roles))
        for name in names
    ]
    how = ", ".join(f"{key} {value}" for key, value in found.protocol.items())
    return [*_table(("", *roles), rows), "", f"({how})", ""]


def _evaluation(stored: Mapping[str, Any]) -> list[str]:
    """One result of `fewstep evaluate --protocol`: the mean over its runs."""
    rows = [(name, short(number(stored["mean"], name))) for name in stored["mean"]]
    heard = str(stored.get("labels", "")).partition(", SHA-256")[0]
    what = heard if heard.startswith("prompts of ") else "samples"
    how = f"{stored.get('samples')} {what} in {stored.get('features')}"
    if "file" in stored["reference"]:
        how += f", against {stored['reference']['file']}"
    how += f", mean of {len(stored['runs'])} runs"
    return [*_table((how, ""), rows), ""]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
