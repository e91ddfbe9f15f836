"""Recipes against what is published: a row of a table for the run, and fields for its method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from typing import Any

import pytest
import torch

from fewstep.distillation.method import Method
from fewstep.plan.meta_step import begun, prepared
from fewstep.runs.run import Run
from fewstep.runs.runner import PreparedRun

COLUMNS = ("batch", "steps", "lr", "beta1", "beta2", "decay", "clip", "average", "rank")
"""decay: of weights; average: the share that is kept in a step, or millions of its half-life with
an M, 0: none; rank: of adapters, 0: none."""
Row = Mapping[str, str]


def rows(table: str, columns: Sequence[str] = COLUMNS) -> dict[str, Row]:
    """The cells of a table by recipe and column."""
    lines = map(str.split, table.strip().split("\n"))
    return {name: dict(zip(columns, cells, strict=True)) for name, *cells in lines}


def differing(facts: Mapping[str, Any], row: Row, loose: Mapping[str, float]) -> list[str]:
    """The columns in which facts of a run are not what a row says; -: it says nothing of them.

    loose: by how much a number may be off, where it is rounded in print.
    """
    wrong = []
    for key, value in facts.items():
        if row[key] == "-":
            continue
        if isinstance(value, str):
            same = row[key] == value
        else:
            same = value == pytest.approx(float(row[key]), rel=1e-9, abs=loose.get(key, 0.0))
        wrong += [] if same else [key]
    return wrong


def cells_apart(run: Run, row: Row) -> list[str]:
    """The columns in which a run is not what a row says."""
    optim = run.optim
    found = {
        "batch": run.batch,
        "steps": run.steps,
        "lr": optim.lr,
        "beta1": optim.betas[0],
        "beta2": optim.betas[1],
        "decay": optim.weight_decay,
        "clip": optim.clip,
        "rank": run.lora.rank if run.lora else 0,
    }
    apart = [name for name, value in found.items() if value != float(row[name])]
    return apart if as_said(run, row["average"]) else [*apart, "average"]


def as_said(run: Run, average: str) -> bool:
    """Whether the average is the one of a cell, from early on where it has a decay."""
    if average.endswith("M"):
        return run.ema.halflife == float(average[:-1]) * 1e6
    kept = [run.ema.decay(run.batch, images) for images in (run.batch, 10**9)]
    return all(abs(share - float(average)) < 1e-9 for share in kept)


def default(f: Field[Any]) -> Any:
    return f.default if f.default is not MISSING else None


def fields_apart(method: Method, told: Mapping[str, Any]) -> list[str]:
    """The fields of a method that are not as told; those not named are to be its defaults."""
    found = [f for f in fields(method) if f.init]
    assert told.keys() <= {f.name for f in found}
    return [f.name for f in found if getattr(method, f.name) != told.get(f.name, default(f))]


def steps(run: Run) -> None:
    """Take the first step of a small run, and its last; all is finite, and the student moves.

    In one of them: a consistency model that starts as its teacher is at rest at first, and a rate
    may have fallen to nearly nothing at last.
    """
    small = replace(run, batch=2, accumulate=1)
    first, last = (prepared(small, "cpu").rehearsal() for _ in range(2))
    at_first = moves(first, first.init())
    assert moves(last, begun(last)) or at_first


def moves(work: PreparedRun, state: Any) -> bool:
    """Whether a step changes the student; its losses are finite."""
    before = {k: v.clone() for k, v in state.nets["student"].state_dict().items()}
    record = next(iter(work.records(state)))
    assert record.logs["skipped"] == 0
    losses = [value for name, value in record.logs.items() if name.endswith("/loss")]
    assert losses
    assert all(torch.isfinite(torch.as_tensor(value)) for value in losses)
    after = record.state.nets["student"].state_dict()
    return any(not torch.equal(after[k], v) for k, v in before.items())
