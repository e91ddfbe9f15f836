"""Explanations in a report of missing quick scores or gauges."""

from __future__ import annotations

from fewstep.config import decode
from fewstep.domains.domain import Domain
from fewstep.domains.prompts import Prompted
from fewstep.report.formatting import count
from fewstep.report.run_data import RunData

CALLS = 4
"""Network calls a sample that looks may cost (see fewstep.runs.monitor)."""


def no_quick(f: RunData) -> str:
    """Why there are no quick scores."""
    if not f.gauges:
        return f"No quick scores: {_no_looks(f)}."
    try:
        domain = decode(f.run.get("domain"), Domain)
    except ValueError as error:
        return f"No quick scores: {error}."
    if isinstance(domain, Prompted):
        if domain.clip:
            return f"No quick scores: {domain.clip} has not judged a look yet."
        return (
            "No quick scores: they are CLIP scores where a model takes prompts, and this run "
            "names no CLIP; --domain.clip FOLDER names one before a run starts."
        )
    return f"No quick scores: nothing measures samples of the domain {type(domain).__name__}."


def no_gauges(f: RunData) -> str:
    """Why there are no gauges."""
    return f"Not recorded: {_no_looks(f)}."


def _no_looks(f: RunData) -> str:
    if not f.log:
        return "no look has been taken yet"
    return (
        f"gauges are taken where a sample costs at most {count(CALLS, 'network call')}, and at no "
        "look of this run it did"
    )
