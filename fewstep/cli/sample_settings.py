"""The settings that a picture was made with, as its file tells them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep import __version__
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import Flow
from fewstep.diffusion.sampler_changes import innermost
from fewstep.diffusion.samplers import FewStep, Heun, MultiStep
from fewstep.runs.teacher import teacher_digest
from fewstep.storage.files import digest


def settings_of(
    generator: Generator, model: Path, negative: str, start: Path | None, strength: float | None
) -> dict[str, Any]:
    """What all pictures of a command have in common, by the names of `fewstep.data.png_text`.

    start, strength: of a picture that they are made from; its digest is told, not its place.
    """
    sampler = generator.sampler
    inner = innermost(sampler)
    found: dict[str, Any] = {
        "negative": negative,
        "steps": int(getattr(inner, "steps", sampler.calls)),
        "calls": sampler.calls,
        "sampler": client_name(generator),
        "sampling": repr(sampler),
        "guidance": float(sampler.kappa) if isinstance(sampler, CFG) else 1.0,
        "strength": strength,
        "from": start.name if start else "",
        "from_sha256": digest(start) if start else "",
        "model": model.resolve().name,
        "model_sha256": teacher_digest(model),
        "version": f"fewstep {__version__}",
    }
    return {name: value for name, value in found.items() if value not in ("", None)}


def client_name(generator: Generator) -> str:
    """What the programs people use call the nearest sampler: "LCM", "DDIM", "Euler", ..."""
    inner = innermost(generator.sampler)
    first_order = "Euler" if isinstance(generator.denoiser.path, Flow) else "DDIM"
    if isinstance(inner, FewStep):
        return first_order if inner.noise == "ddim" else "LCM"
    if isinstance(inner, Heun):
        return first_order if inner.order == 1 else "Heun"
    names: Mapping[str, str] = {"dpm++": "DPM++ 2M", "unipc": "UniPC"}
    return names[inner.kind] if isinstance(inner, MultiStep) else type(inner).__name__
