"""What a training step costs beside the calls of its networks: python benchmarks/steps.py

One thread, process CPU time, the sides of a ratio in turns on the same numbers; a ratio is the
median over the rounds. Bare calls are those of a SiD step, forward and backward, as one would
write them down: no draws, no losses, no optimiser, no average, no loop.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.data.batches import Latents
from fewstep.diffusion import rng
from fewstep.diffusion.rng import Draws
from fewstep.eval.frechet import FeatureMoments, frechet_distance, moments
from fewstep.methods.sid import SiD
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.storage.files import write_json
from fewstep.training.adam import Adam
from fewstep.training.loop import Record, train

RESULT = Path(__file__).parent / "results" / "steps.json"
SHAPE = (3, 16, 16)
NETWORK: dict[str, Any] = {
    "model_type": "SongUNet",
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 2,
    "attn_resolutions": [8],
    "dropout": 0.0,
}
FEATURES = 1024


def seconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Processor time of each call in every round, in turns; one round before does not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            spent = time.process_time() - began
            if number:
                found[name].append(spent)
    return found


def ratio(found: Mapping[str, list[float]], one: str, other: str) -> float:
    """The median of one call's time over another's."""
    pairs = zip(found[one], found[other], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def bare(net: nn.Module, batch: int) -> Callable[[], None]:
    """The network calls of a step of SiD."""
    student, fake, teacher = (deepcopy(net).requires_grad_(False) for _ in range(3))
    z, t = torch.randn(batch, *SHAPE), torch.ones(batch)

    def step() -> None:
        fake.requires_grad_(True)
        with torch.no_grad():
            x = student(z, t)
        fake(x, t).mean().backward()
        fake.requires_grad_(False)
        student.requires_grad_(True)
        x = student(z, t)
        (teacher(x, t) + fake(x, t) + x).mean().backward()
        student.requires_grad_(False)
        for one in (student, fake):
            one.zero_grad(set_to_none=True)

    return step


def steps(net: nn.Module, batch: int, rounds: int) -> dict[str, float]:
    """Of SiD, with a rollout for each half and with a shared one, beside the bare calls."""

    def run(shared: bool) -> Iterator[Record]:
        method = SiD(shared=shared)
        return train(method, net, net, Latents(SHAPE), batch=batch, steps=rounds + 1)

    apart, shared = run(False), run(True)
    calls = {"bare": bare(net, batch), "step": lambda: next(apart), "shared": lambda: next(shared)}
    found = seconds(calls, rounds)
    return {
        "step, seconds": round(statistics.median(found["step"]), 3),
        "step over bare calls": ratio(found, "step", "bare"),
        "shared rollout over two": ratio(found, "shared", "step"),
    }


def optimisers(net: nn.Module, rounds: int) -> dict[str, float]:
    """An update of ours over that of torch's own class, and the numbers kept for each weight."""
    out = {}
    for beta in (0.0, 0.9):
        sides = {}
        for name, kind in (("ours", Adam), ("stock", torch.optim.Adam)):
            parameters = list(deepcopy(net).requires_grad_(True).parameters())
            for p in parameters:
                p.grad = torch.randn_like(p)
            sides[name] = kind(parameters, 1e-4, (beta, 0.999), 1e-8)
        found = seconds({name: side.step for name, side in sides.items()}, 5 * rounds)
        out[f"beta_1 {beta:g}, ours over torch's"] = ratio(found, "ours", "stock")
    return out


def draws(rounds: int) -> dict[str, float]:
    """Normal numbers drawn by numpy over the same by torch's operations."""

    def by_torch(call: Callable[[], object]) -> Callable[[], None]:
        def operations() -> None:
            plain, rng._is_plain = rng._is_plain, lambda index: False
            call()
            rng._is_plain = plain

        return operations

    out = {}
    for name, shape, times in (("16 x 2", (2,), 100), ("16 x 3072", (3, 32, 32), 10)):
        made = Draws.range(0, 16)

        def many(made: Draws = made, shape: tuple[int, ...] = shape, times: int = times) -> None:
            for _ in range(times):
                made.normal("z", shape)

        found = seconds({"numpy": many, "torch": by_torch(many)}, rounds)
        out[f"{name}, numpy over torch"] = ratio(found, "numpy", "torch")
    return out


def evaluation(rounds: int) -> dict[str, float]:
    """The Frechet distance over that by the eigenvalues of the product of the covariances."""
    x = torch.randn(2, 2 * FEATURES, FEATURES) * torch.logspace(0, -2, FEATURES)
    a, b = moments(x[0]), moments(x[1] + 0.1 * x[1].roll(1, 1))

    def by_eigenvalues() -> float:
        return product_distance(a, b)

    values = frechet_distance(a, b), by_eigenvalues()
    found = seconds({"ours": lambda: frechet_distance(a, b), "product": by_eigenvalues}, rounds)
    return {
        "features": FEATURES,
        "Frechet distance over eigenvalues of the product": ratio(found, "ours", "product"),
        "their relative difference": abs(values[0] / values[1] - 1),
    }


def product_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    root = torch.linalg.eigvals(a.sigma @ b.sigma).real.clamp_min(0).sqrt().sum()
    gap = (a.mu - b.mu).square().sum()
    return float(gap + a.sigma.trace() + b.sigma.trace() - 2 * root)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = EDMPrecond(16, 3, **NETWORK)
    for p in net.parameters():
        p.data.add_(0.02 * torch.randn(p.shape))
    result: dict[str, Any] = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "rounds": rounds,
        "parameters": sum(p.numel() for p in net.parameters()),
        "batch 2": steps(net, 2, rounds),
        "batch 16": steps(net, 16, rounds),
        "Adam": optimisers(net, rounds),
        "draws": draws(rounds),
        "evaluation": evaluation(3),
    }
    write_json(RESULT, result)
    print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
