"""Evaluate the student while it trains: the log, the gauges and the sample grids."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.data.image_grid import grid, png
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Source, select_rows
from fewstep.distillation.method import Method, Product
from fewstep.eval.clip_monitor import PromptMetrics
from fewstep.eval.domain_scores import SampleMetrics, score
from fewstep.eval.gauges import by_level, diversity, extremes, passed, spread
from fewstep.runs.run import Run
from fewstep.runs.run_folder import RunFolder
from fewstep.storage.files import write
from fewstep.training import distributed
from fewstep.training.loop import Record, State

LOOK, SCORED = 500, 1000
"""Samples that the gauges, and the quick distances, are computed on."""


def made_so_far(method: Method, state: State, teacher: Generator | None) -> Product:
    """What a run would ship at this state of its training."""
    denoiser = None if teacher is None else teacher.denoiser
    return method.product(state.nets, state.average, denoiser)


@dataclass
class Monitor:
    """Writes the log, the gauges and the pictures of a run.

    All ranks look, since nets may be sharded among them; rank 0 writes.
    """

    run: Run
    folder: RunFolder
    teacher: Generator | None
    source: Source
    sample_metrics: SampleMetrics | None = None
    judge: PromptMetrics | None = None

    def begin(self, state: State) -> dict[str, Any] | None:
        """Drop log lines of steps that are repeated; at step 0, what the first `look` found."""
        self.writes = distributed.rank() == 0
        for name in ("log.jsonl", "gauges.jsonl") if self.writes else ():
            self.folder.rewind(name, state.step or -1)  # step 0 is looked at again
        self.sample_metrics = self.run.domain.sample_metrics() if self.writes else None
        self.judge = self.run.domain.judge()
        self.every = max(1, self.run.steps // 500)
        spent = [line.get("seconds", 0.0) for line in self.folder.lines("log.jsonl")]
        self.began = time.perf_counter() - (spent[-1] if spent else 0.0)
        self.skipped = state.skipped
        return None if state.step else self.look(state)

    def log(self, record: Record) -> None:
        """Append a line to log.jsonl: about 500 in a run, and one for every skipped update."""
        skipped, self.skipped = record.state.skipped > self.skipped, record.state.skipped
        due = record.step % self.every == 0 or record.step == self.run.steps or skipped
        if due and self.writes:
            seconds = time.perf_counter() - self.began
            line = {"step": record.step, "images": record.images, "seconds": round(seconds, 2)}
            finite = {k: v if math.isfinite(v) else str(v) for k, v in record.logs.items()}
            self.folder.append("log.jsonl", {**line, **finite})

    @torch.no_grad()
    def look(self, state: State) -> dict[str, Any] | None:
        """Evaluate the present average: sample grid, gauges, quick distances on few samples.

        Returns the line of gauges.jsonl on rank 0, None on other ranks.

        Models that take prompts make fewer samples, in parts as small as the training's, since
        each takes much memory and time; their prompt metrics are computed on rank 0.
        """
        run, generator = self.run, self.generator(state)
        prompted = generator.condition is not None
        cheap = generator.sampler.calls <= 4
        part, shown = (run.batch // run.accumulate, 20) if prompted else (SCORED, 80)
        judge = self.judge if cheap else None
        few = max(shown, len(judge.prompts)) if judge else shown
        x = generator.sample(range(SCORED if cheap and not prompted else few), batch=part)
        line: dict[str, Any] = {}
        if cheap:
            line = self._gauges(state, x, generator, min(LOOK, part))
        if self.writes:  # after all that the ranks do together
            name = f"step-{state.step:08d}.png"
            decode = (lambda x: x) if self.teacher is None else self.teacher.decode
            pictures = torch.cat([decode(piece).cpu() for piece in x[:few].split(part)])
            self.folder.check()
            write(self.folder.grids / name, png(grid(pictures[:shown], columns=10)))
            if judge is not None:
                n = len(judge.prompts)
                line["quick"] = {"samples": n, **judge(pictures[:n])}
            if line:
                self.folder.append("gauges.jsonl", line)
        return line if self.writes else None

    def generator(self, state: State) -> Generator:
        """What the run would ship now, as a generator of samples, which are not decoded."""
        model, condition = self.run.result, getattr(self.source, "condition", None)
        product = made_so_far(self.run.method, state, self.teacher)
        return Generator(*product, model.shape, model.classes, condition=condition)

    def _gauges(self, state: State, x: Tensor, generator: Generator, few: int) -> dict[str, Any]:
        """Diversity, agreement by noise level, and distances to a few real pictures."""
        line: dict[str, Any] = {"step": state.step, "images": state.images}
        every, classes = torch.arange(len(x), device=x.device), self.run.result.classes
        labels = every % classes if classes else None
        known = None if labels is None else labels[:LOOK]
        line["diversity"] = diversity(x[:LOOK], known)
        if generator.sampler.calls == 1:
            seeds = every[:LOOK].to(x.device)
            line["passed"] = passed(
                x[:LOOK], Draws(seeds, 0, "sample/").normal("z", generator.shape), known
            )
        line["spread"] = spread(x[:LOOK])
        line["levels"] = self._levels(state, x[:few], generator)
        if self.sample_metrics is not None:
            known = None if labels is None else labels.cpu()
            line["quick"] = {"samples": len(x), **score(x.cpu(), known, self.sample_metrics)}
            line |= self._beside_real(x[:LOOK], self.sample_metrics)
        return line

    def _beside_real(self, x: Tensor, real: SampleMetrics) -> dict[str, Any]:
        """The share of values at the ends of the real range, and the same gauges of real data."""
        held, labels = real.held_out[:LOOK], real.held_out_labels
        known = labels[:LOOK] if self.run.result.classes else None
        low, high = float(held.min()), float(held.max())
        ends = {"extremes": extremes(held, low, high), "diversity": diversity(held, known)}
        return {
            "extremes": extremes(x, low, high),
            "real": {**ends, "spread": spread(held)},
        }

    def _levels(self, state: State, x: Tensor, generator: Generator) -> list[dict[str, float]]:
        if self.teacher is None:
            return []
        times = self.run.method.noise_levels(self.teacher.denoiser.path)
        if times is None:
            return []
        fake: Any = dict(state.nets.items()).get("fake")
        index = torch.arange(len(x))
        cond = select_rows(generator.conditions(index), index, x.device)
        draws = Draws.range(0, len(x), device=x.device)
        return by_level(x, cond, self.teacher.denoiser, fake, times, draws)
