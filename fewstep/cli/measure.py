"""Measure a finished run, its teacher and real data, with progress for a person."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.cli.progress_bar import Bar, say
from fewstep.diffusion.generator import Generator
from fewstep.domains.domain import Domain
from fewstep.eval.domain_scores import SampleMetrics, evaluate, real_scores
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.teacher import load_teacher, teacher_of, with_conditions
from fewstep.storage.files import write_json
from fewstep.storage.model_folder import load_student
from fewstep.storage.user_code import decoded
from fewstep.teachers.diffusers.single_file import located

Metrics = dict[str, dict[str, float]]


def found_again(run: Path, teacher: str) -> None:
    """Record where the teacher of the run folder `run` is now; a ValueError if it is another."""
    teacher_of(RunFolder(run), located(teacher, say))


def measured(path: Path, samples: int, draws: int) -> Metrics:
    """Measure the run in `path`, its teacher and real data; writes and returns metrics.json."""
    folder = RunFolder(path)
    facts = folder.facts()
    folder.refuse_unfinished()
    domain: Domain = decoded(facts["run"].get("domain"), Domain, path)
    sample_metrics = domain.sample_metrics()
    if sample_metrics is None:
        raise ValueError(
            f"{path} cannot be measured: its domain, {type(domain).__name__}, has no metrics; "
            "'fewstep evaluate' measures pictures by --protocol fid50k, and by --prompts those of "
            "models that take prompts; 'fewstep report' shows what it makes"
        )
    models = {"student" if facts.get("distils", True) else "teacher": load_student(path)}
    if "student" in models:
        student = models["student"].model
        if teacher := load_teacher(domain, teacher_of(folder), model=student):
            models = {"teacher": teacher, **models}
    metrics: Metrics = {"real": real_scores(sample_metrics, samples)}
    for role, model in models.items():
        given = with_conditions(model, domain)
        metrics[role] = _scores(role, given, sample_metrics, samples, draws)
    stored: dict[str, Any] = {
        **metrics,
        "protocol": {"samples": samples, "draws": draws, "distance": sample_metrics.distance},
    }
    write_json(path / "metrics.json", stored)
    return metrics


def _scores(
    role: str, generator: Generator, sample_metrics: SampleMetrics, samples: int, draws: int
) -> dict[str, float]:
    """All draws of one generator, with a bar."""
    scores: dict[str, float] = {}
    with Bar(f"measuring {role}", draws) as bar:
        for scores in evaluate(generator, sample_metrics, samples, draws):
            bar.update(int(scores["draws"]))
    return scores


def table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics as aligned text, mean +- standard deviation over the draws."""
    names = [n for n in next(iter(metrics.values())) if not n.endswith("_std") and n != "draws"]
    width = max(14, *(len(name) + 1 for name in names))
    lines = [" " * width + "".join(f"{role:>22}" for role in metrics)]
    for name in names:
        cells = []
        for scores in metrics.values():
            spread = scores.get(f"{name}_std", 0.0)
            value = f"{scores[name]:.4g}" if name in scores else "-"
            cells.append(value + (f" +- {spread:.2g}" if spread else ""))
        lines.append(f"{name:{width}}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)
