"""Ways to run a distillation on given GPUs, and what each of them takes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import Flow
from fewstep.diffusion.without_values import without_values
from fewstep.nets.lora import LoRA
from fewstep.plan.links import Links
from fewstep.plan.meta_step import StepCost, measure_step
from fewstep.plan.traffic import saving, step_seconds, traffic
from fewstep.recipes.registry import every
from fewstep.runs.command_line import command_line
from fewstep.runs.run import Run
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.training.distributed import TIMEOUT
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


PATIENCE = 4
"""Times of a step at least, after which one may count as hanging."""

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
    parts: int = 1
    """GPUs that share a copy of every net; 1: each has whole ones."""
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
    """A step, if the GPUs compute and send at the assumed rates."""
    fits: bool
    batch: int = 0
    """Samples of a step: the run's, or as many as the GPUs compute at once if those are more."""
    computing: float = 0.0
    """Seconds of a step in which a GPU computes."""
    sending: float = 0.0
    """And in which it sends and receives; nets in parts compute meanwhile."""
    sent: float = 0.0
    """Bytes that a GPU sends in a step."""
    messages: int = 0
    hops: float = 0.0
    """Seconds of `sending` that no wider link would save."""
    reading: float = 0.0
    """Seconds in which the node reads the conditions and pictures of a step from its disk."""
    checkpoint: float = 0.0
    """Bytes of a checkpoint."""
    saving: float = 0.0
    """Seconds of a step that checkpoints add."""
    start: float = 0.0
    """Bytes on each GPU before the first step, when nets are made; `memory` is no less."""


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
    run: Run,
    chosen: Choice,
    gpus: GPUs,
    rate: float,
    teacher: Model | None = None,
    links: Links = Links(),
) -> Iterator[Row]:
    """The rows of one choice: whole nets on every GPU and, of several, parts of them.

    rate: floating-point operations a second of a GPU in bf16; a quarter of them in fp32. teacher:
    the teacher's network, where it is not the student's. Raises ValueError where the run cannot be
    done so.
    """
    rate /= 4 if chosen.precision == "fp32" else 1
    cost = measure_step(chosen.of(run), gpu=True, teacher=teacher)
    yield row(cost, run, chosen, gpus, rate, links)
    if gpus.count == 1 or chosen.lora or chosen.bits != 32:
        return
    cost = measure_step(chosen.of(run), gpu=True, teacher=teacher, parts=True)
    for parts in numbers_of_parts(gpus, links):
        yield row(cost, run, replace(chosen, parts=parts), gpus, rate, links)


def numbers_of_parts(gpus: GPUs, links: Links) -> list[int]:
    """In how many parts nets are cut: one for each GPU, or one for each of a node."""
    nodes = gpus.count > links.per_node > 1 and gpus.count % links.per_node == 0
    return [gpus.count, links.per_node] if nodes else [gpus.count]


def row(
    cost: StepCost, run: Run, chosen: Choice, gpus: GPUs, rate: float, links: Links = Links()
) -> Row:
    """What a step costs on these GPUs, by what it costs a process; rate: operations a second."""
    share = microbatches(run, chosen, gpus)
    computing = cost.operations * share / rate
    found = traffic(cost, gpus.count, chosen.parts, share, links)
    reading = share * chosen.batch * cost.sample * min(gpus.count, links.per_node) / links.disk
    seconds = step_seconds(computing, found.seconds, chosen.parts) + reading
    kept = saving(cost, chosen.parts, links)
    memory = float(cost.peak) if chosen.parts == 1 else in_parts(cost, chosen.parts)
    return Row(
        chosen,
        memory,
        seconds,
        fits=SLACK * memory + RESERVE <= gpus.memory,
        batch=share * chosen.batch * gpus.count,
        computing=computing,
        sending=found.seconds,
        sent=found.sent,
        messages=found.messages,
        hops=found.hops,
        reading=reading,
        checkpoint=kept.bytes,
        saving=kept.a_step(run.save_every, seconds),
        start=float(cost.start),
    )


def microbatches(run: Run, chosen: Choice, gpus: GPUs) -> int:
    """Parts in which each GPU computes its share of a batch."""
    return max(1, run.batch // (chosen.batch * gpus.count))


def in_parts(cost: StepCost, count: int) -> float:
    """Bytes where each of `count` GPUs keeps its part of every net, and two blocks are whole.

    Before that, every net is made whole on each.
    """
    parted = cost.kept + cost.gradient
    return max(cost.start, parted / count + max(0, cost.peak - parted) + 2 * cost.block)


def best(found: Sequence[Row]) -> Row | None:
    """Of those that fit: whole networks before adapters, exact moments before those of 8 bits,
    then the fastest, then the smallest."""

    def order(row: Row) -> tuple[Any, ...]:
        chosen = row.choice
        return chosen.lora, chosen.bits == 8, row.seconds, chosen.batch, row.memory

    return min((row for row in found if row.fits), key=order, default=None)


def command(
    row: Row,
    run: Run,
    recipe: str,
    teacher: str,
    gpus: GPUs,
    own: Sequence[str] = (),
    per_node: int = 8,
) -> str:
    """The command line of a row; `own`: the person's own flags for the recipe."""
    chosen = row.choice
    share = microbatches(run, chosen, gpus)
    words = ["fewstep", "distill", recipe, "--teacher", teacher, "--device", "cuda"]
    if gpus.count > 1:
        words = [*launcher(gpus.count, per_node), *words]
        patience = math.ceil(PATIENCE * row.seconds)
        words += ["--timeout", str(patience)] if patience > TIMEOUT else []
    if chosen.parts > 1:
        words += ["--shard"] if chosen.parts == gpus.count else ["--shard", str(chosen.parts)]
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


def launcher(count: int, per_node: int) -> list[str]:
    """The words that start a process on each of `count` GPUs, to be said on every node."""
    if count <= per_node:
        return ["torchrun", "--standalone", f"--nproc-per-node={count}", "-m"]
    nodes = [f"--nnodes={count // per_node}", f"--nproc-per-node={per_node}"]
    return ["torchrun", *nodes, "--rdzv-backend=c10d", "--rdzv-endpoint=HOST:29500", "-m"]


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
