"""Ways to run a distillation on given GPUs, and what each of them takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import Flow
from fewstep.diffusion.without_values import without_values
from fewstep.nets.lora import LoRA
from fewstep.plan.meta_step import StepCost, measure_step
from fewstep.recipes.registry import every
from fewstep.runs.command_line import command_line
from fewstep.runs.run import Run
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.training.precision import Held, Precision, product_layers

GiB = 2**30
RESERVE = GiB
"""Bytes of a GPU that its driver and libraries take."""
SLACK = 1.05
"""What the allocator takes beside what it gives out."""


@dataclass(frozen=True)
class GPUs:
    """Number of GPUs, and the memory of each in bytes."""

    count: int
    memory: float

    @classmethod
    def parse(cls, text: str) -> GPUs:
        """ "2x24GB": two of 24 GiB, as cards are sold."""
        match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)(?:GB|GiB|G)", text.strip(), re.IGNORECASE)
        if not match or int(match[1]) < 1 or not float(match[2]):
            raise ValueError(
                f"--gpus is written like 1x24GB or 8x80GB, got {text!r}; what a run takes on a "
                "CPU is told by 'fewstep distill ... --dry-run'"
            )
        return cls(int(match[1]), float(match[2]) * GiB)


PLANNED = {
    *("--batch", "--accumulate", "--precision", "--frozen", "--recompute", "--no-recompute"),
    *("--lora", "--optim.bits", "--fake-optim"),
}
"""Flags that a row's command has."""


@dataclass(frozen=True)
class Choice:
    """One way of running a distillation."""

    lora: bool
    recompute: bool
    precision: Precision
    batch: int
    """Samples that a GPU computes at once."""
    sharded: bool = False
    frozen: Held = "fp32"
    bits: Literal[32, 8] = 32
    """Of Adam's moments."""

    def of(self, run: Run) -> Run:
        """`run` changed to this choice; its batch becomes what one GPU computes at once."""
        fake = run.fake_optim and replace(run.fake_optim, bits=self.bits)
        return replace(
            run,
            lora=(run.lora or LoRA()) if self.lora else None,
            recompute=self.recompute,
            precision=self.precision,
            frozen=self.frozen,
            optim=replace(run.optim, bits=self.bits),
            fake_optim=fake,
            batch=self.batch,
            accumulate=1,
        )


@dataclass(frozen=True)
class Row:
    """A choice with its memory and time."""

    choice: Choice
    memory: float
    """Bytes on each GPU."""
    seconds: float
    """A step of the run's batch, if the GPUs compute at the assumed rate."""
    fits: bool


def choices(model: Model, batches: Sequence[int]) -> list[Choice]:
    """Every way, from the least changed to the smallest; sharded ones come of the others.

    In bf16 frozen weights are held so too where they can be, since nothing else changes. Adapters
    have so few moments that they keep them in 32 bits.
    """
    kinds: list[tuple[Precision, Held]] = [("fp32", "fp32"), ("bf16", holds(model))]
    both: tuple[Literal[32, 8], ...] = (32, 8)
    grid = product((False, True), (False, True), kinds, both, batches)
    return [
        Choice(lora, again, precision, batch, frozen=frozen, bits=bits)
        for lora, again, (precision, frozen), bits, batch in grid
        if bits == 32 or not lora
    ]


def holds(model: Model) -> Held:
    """ "bf16" if frozen weights of such a network can be stored in bf16, else "fp32"."""
    with without_values():
        net = model.build()
    try:
        product_layers(net)
    except ValueError:
        return "fp32"
    return "bf16"


def rows(
    run: Run, chosen: Choice, gpus: GPUs, rate: float, teacher: Model | None = None
) -> Iterator[Row]:
    """The rows of one choice: whole nets on every GPU and, of several, parts of them.

    rate: floating-point operations a second of a GPU in bf16; a quarter of them in fp32. teacher:
    the teacher's network, where it is not the student's. Raises ValueError where the run cannot be
    done so.
    """
    cost = measure_step(chosen.of(run), gpu=True, teacher=teacher)
    rate /= 4 if chosen.precision == "fp32" else 1
    seconds = cost.operations * run.batch / chosen.batch / gpus.count / rate
    parted = gpus.count > 1 and not chosen.lora and chosen.bits == 32
    for sharded in (False, True)[: 1 + parted]:
        memory = in_parts(cost, gpus.count) if sharded else float(cost.peak)
        fits = SLACK * memory + RESERVE <= gpus.memory
        yield Row(replace(chosen, sharded=sharded), memory, seconds, fits)


def in_parts(cost: StepCost, count: int) -> float:
    """Bytes where each of `count` GPUs keeps its part of every net, and two blocks are whole."""
    parted = cost.kept + cost.gradient
    return parted / count + max(0, cost.peak - parted) + 2 * cost.block


def best(found: Sequence[Row]) -> Row | None:
    """Of those that fit: whole networks before adapters, exact moments before those of 8 bits,
    then the fastest, then the smallest."""

    def order(row: Row) -> tuple[Any, ...]:
        chosen = row.choice
        return chosen.lora, chosen.bits == 8, row.seconds, chosen.batch, row.memory

    return min((row for row in found if row.fits), key=order, default=None)


def command(
    row: Row, run: Run, recipe: str, teacher: str, gpus: GPUs, own: Sequence[str] = ()
) -> str:
    """The command line of a row; `own`: the person's own flags for the recipe."""
    chosen = row.choice
    share = max(1, run.batch // (chosen.batch * gpus.count))
    words = ["fewstep", "distill", recipe, "--teacher", teacher, "--device", "cuda"]
    if gpus.count > 1:
        launch = ["torchrun", "--standalone", f"--nproc-per-node={gpus.count}", "-m"]
        words = [*launch, *words, *(["--shard"] if chosen.sharded else [])]
    words += unplanned(own)
    if run.domain.example and not any(word.startswith("--domain") for word in own):
        words += ["--domain", run.domain.example]
    words += ["--batch", str(share * chosen.batch * gpus.count), "--accumulate", str(share)]
    words += ["--precision", chosen.precision]
    words += ["--frozen", "bf16"] if chosen.frozen == "bf16" else []
    words += ["--recompute"] if chosen.recompute else ["--no-recompute"]
    words += ["--lora", repr(run.lora or LoRA())] if chosen.lora else []
    if chosen.bits == 8:
        words += ["--optim.bits", "8"]
        fake = run.fake_optim and replace(run.fake_optim, bits=8)
        words += ["--fake-optim", repr(fake)] if fake else []
    return command_line(words)


def unplanned(flags: Sequence[str]) -> Iterator[str]:
    """Those of the flags, with their values, that a row does not say itself."""
    kept = True
    for word in flags:
        if word.startswith("--"):
            kept = word.partition("=")[0] not in PLANNED
        if kept:
            yield word


def recipe_for(model: Model) -> str:
    """The recipe that distils such a model; a ValueError where none is known."""
    if isinstance(model.net, DiffusersNet):
        return "t2i_flow" if isinstance(model.path, Flow) else "t2i"
    made = {name: make() for name, make in every().items()}
    known = {name: run.model for name, run in made.items() if run.distils}
    for like in (lambda m: m, lambda m: (m.shape, m.classes, m.path)):
        for name, candidate in known.items():
            if like(candidate) == like(model):
                return name
    raise ValueError(
        f"no recipe distils a model of {model.shape} with {model.classes} classes; name one with "
        "--recipe"
    )
