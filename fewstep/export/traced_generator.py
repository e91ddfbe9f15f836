"""A whole generator as one traced graph: (z, noise, conditions) -> x.

The loop of the sampler is part of the graph, so that whoever runs it needs no scheduler, no
timesteps and no fewstep. All that is random is an input:

    z        (B, *)          standard normal, what the student starts from
    noise    (B, N, *)       standard normal, of a sampler that draws noise N times beside z
    label    (B,) int64      of a class-conditional student; `classes` stands for none
    start    (B, *)          a picture to restore, of a network that is given one
    prompt, pooled, mask     the embeddings of a prompt, as the teacher's pipeline makes them

Of a pipeline x is a latent, or what the VAE makes of it for a student that decodes, a picture
in [-1, 1]. B is free. The graph is traced on a CPU in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.pixels import finite
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import course
from fewstep.teachers.diffusers.adapter_base import adapter_of

Inputs = dict[str, Tensor]
LAST_PLACES = 32
"""Units in the last place of the noise whose effect is taken for rounding."""


@dataclass(frozen=True)
class Given(Draws):
    """Draws that return the given noise in order, instead of random numbers."""

    noises: tuple[Tensor, ...] = ()
    purposes: dict[str, int] = field(default_factory=dict)

    def normal(self, purpose: str, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """The next given noise, and the same again for a purpose that was met before."""
        return self.noises[self.purposes.setdefault(self.prefix + purpose, len(self.purposes))]


class Program(nn.Module):
    """A student and its sampler as one module, called with `Inputs`."""

    def __init__(self, student: Generator) -> None:
        super().__init__()
        self.denoiser = student.denoiser
        self.sampler, self.decode = student.sampler, student.decode

    def forward(self, inputs: Inputs) -> Tensor:
        """Samples x_0 (B, *), decoded as the student decodes."""
        remaining = dict(inputs)
        z = remaining.pop("z")
        noise = remaining.pop("noise", None)
        noises = () if noise is None else noise.unbind(1)
        cond = remaining.pop("label", None) if "label" in remaining else (remaining or None)
        return self.decode(self.sampler(self.denoiser, z, cond, Given(z, noises=noises)))


def examples(student: Generator, count: int, seed: int = 0) -> Inputs:
    """`count` plausible inputs of its program: a pure function of `seed`."""
    draws = Draws.range(0, count, seed)
    inputs = {"z": draws.normal("z", student.shape)}
    if drawn := course(student.sampler, student.denoiser.path).noises:
        inputs["noise"] = draws.normal("noise", (drawn, *student.shape))
    if student.classes:
        inputs["label"] = draws.integers("label", student.classes + 1)
    for name, shape in getattr(student.denoiser, "data_conditions", {}).items():
        inputs[name] = draws.normal(name, shape)
    net = adapter_of(student.denoiser)
    if net is not None:
        for name, null in net.null().items():
            spread = null.expand(count, *null.shape)
            moved = spread + draws.normal(name, null.shape)
            inputs[name] = spread.contiguous() if name == "mask" else moved
    return inputs


def traced(student: Generator) -> torch.export.ExportedProgram:
    """The program as a graph with a free batch size."""
    inputs = examples(student, 2)
    program = Program(student).eval()
    with torch.no_grad():
        program(inputs)  # what networks and paths keep for later calls is made before
        return torch.export.export(
            program,
            (inputs,),
            dynamic_shapes={"inputs": {name: {0: torch.export.Dim.AUTO} for name in inputs}},
        )


def batches(program: torch.export.ExportedProgram) -> int | None:
    """The largest batch that the graph accepts; None: any."""
    ends = [int(r.upper) for r in program.range_constraints.values() if r.upper.is_Integer]
    return min(ends, default=None)


def difference(student: Generator, run: Any, counts: tuple[int, ...] = (1, 3)) -> float:
    """The largest difference between `run(inputs)` and the student, relative to its maximum.

    counts: batch sizes to compare at, other than the traced one.
    """
    worst = 0.0
    for count in counts:
        inputs = examples(student, count, seed=count)
        with torch.no_grad():
            reference = finite(Program(student)(inputs))
        worst = max(
            worst, float((finite(run(inputs)) - reference).abs().max() / reference.abs().max())
        )
    return worst


def within(difference: float, tolerance: float, student: Generator, what: str) -> float:
    """`difference`, relative to the largest number; ValueError where it is more than rounding.

    Arguments:
        tolerance: what is always allowed. Where `by_last_place` says that rounding alone does
            more, `LAST_PLACES` times that is.
        what: was exported, for the message.
    """
    most = tolerance
    if difference > tolerance:
        most = max(tolerance, LAST_PLACES * by_last_place(student))
    if not difference <= most:
        raise ValueError(
            f"the exported {what} differs from the student by {difference:.2g} of its range, more "
            f"than {most:.2g}; nothing was written"
        )
    return difference


@torch.no_grad()
def by_last_place(student: Generator) -> float:
    """How far a sample moves, relative to the largest number, where its noise moves by 2^-23.

    Rounding in a call is as large and is passed on by the later calls, so that a student of
    several calls from pure noise may differ by many times that without being wrong.
    """
    inputs, program = examples(student, 1), Program(student)
    signs = Draws.range(0, 1).normal("signs", student.shape).sign()
    x = program(inputs)
    moved = program({**inputs, "z": inputs["z"] * (1 + signs * torch.finfo(signs.dtype).eps)})
    return float((moved - x).abs().max() / x.abs().max())


def described(student: Generator, inputs: Inputs, most: int | None) -> dict[str, Any]:
    """The metadata of a program, as JSON values."""
    return {
        "what": "a generator: inputs -> "
        + ("x_0" if student.text is None else "pictures in [-1, 1]"),
        "sampler": repr(student.sampler),
        "inputs": {
            name: {"shape": ["B", *t.shape[1:]], "type": str(t.dtype).removeprefix("torch.")}
            for name, t in inputs.items()
        },
        "output": _output(student),
        "largest B": most,
        "classes": student.classes,
        "card": dict(student.card),
    }


def _output(student: Generator) -> str:
    """What comes out, in words."""
    net = adapter_of(student.denoiser)
    if net is None:
        return f"x_0 of shape {_of_batch(student.shape)}"
    if student.text is None:
        return f"x_0, scaled latents of shape {_of_batch(student.shape)}"
    return f"pictures of shape {_of_batch((3, *net.size))} in about [-1, 1]; clip them"


def _of_batch(shape: tuple[int, ...]) -> str:
    return f"[B, {', '.join(map(str, shape))}]"
