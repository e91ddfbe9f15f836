"""Correctness against the CPU, step time, memory, mixed precision, torch.compile and waits.

Prints one line a check; exits with 1 if a correctness check fails. See gpu.sh.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from fewstep import (
    MLP,
    SIM,
    DiffInstruct,
    Draws,
    GaussianMixture,
    Latents,
    Method,
    Model,
    Optim,
    SiD,
    train,
)
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.training.compiled import compile_calls
from fewstep.training.convolutions import prepare_convolutions
from fewstep.training.loop import Record, State
from fewstep.training.precision import Precision

FAILED: list[str] = []


def check(name: str, error: float, bound: float) -> None:
    """Report a correctness figure against its bound."""
    good = error <= bound
    print(f"{'ok  ' if good else 'FAIL'}  {name}: {error:.2e} (bound {bound:.0e})")
    if not good:
        FAILED.append(name)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b| of flattened tensors, on the CPU in float64."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def unet(device: str, channels: int = 128) -> nn.Module:
    """CIFAR-10's DDPM++ (55.7 M parameters at 128 channels), randomly initialised."""
    torch.manual_seed(0)
    net = EDMPrecond(
        img_resolution=32,
        img_channels=3,
        model_type="SongUNet",
        model_channels=channels,
        channel_mult=[2, 2, 2],
    )
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return net.eval().to(device)


def same_as_cpu(device: str) -> None:
    """Draws bit for bit; three steps of each method; the U-Net and its input gradient."""
    here, there = Draws.range(5, 64), Draws.range(5, 64, device=device)
    check("draws: integers", float((here.bits("a", 9) != there.bits("a", 9).cpu()).sum()), 0)
    check("draws: normals", relative(there.normal("z", (3, 8)), here.normal("z", (3, 8))), 1e-6)
    methods: tuple[Method, ...] = (SiD(), SIM(), DiffInstruct())
    for method in methods:
        ends = []
        for where in ("cpu", device):
            teacher = GaussianMixture.ring(std=0.2).to(where).double()
            net = Model(MLP(64, 1), (2,)).build().to(where).double()
            source = Latents((2,))
            double: Callable[..., Any] = lambda draws, s=source: s(draws)._replace(  # noqa: E731
                z=draws.normal("z", (2,), torch.float64)
            )
            *_, last = train(method, teacher, net, double, batch=64, steps=3, optim=Optim(1e-3))
            ends.append(torch.cat([p.flatten() for p in last.state.average.parameters()]))
        check(f"three steps of {type(method).__name__}", relative(ends[1], ends[0]), 1e-5)
    nets = [unet("cpu", 32), unet(device, 32)]
    torch.manual_seed(1)
    x, sigma = 2 * torch.randn(4, 3, 32, 32), torch.tensor([0.1, 0.5, 2.0, 20.0])
    outs = []
    for net, where in zip(nets, ("cpu", device), strict=True):
        xt = x.to(where).requires_grad_()
        out = net(xt, sigma.to(where))
        (grad,) = torch.autograd.grad((out**2).sum(), xt)
        outs.append((out, grad))
    check("DDPM++ denoised", relative(outs[1][0], outs[0][0]), 1e-4)
    check("DDPM++ input gradient", relative(outs[1][1], outs[0][1]), 1e-3)


def timed(step: Callable[[], Any], device: str, repeat: int) -> float:
    """Median milliseconds of `step` after two warm-ups."""
    spent = []
    for i in range(repeat + 2):
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
        del i
    return 1000 * sorted(spent[2:])[repeat // 2]


MODES: dict[str, tuple[Precision, bool, bool]] = {
    "float32": ("fp32", False, False),
    "bfloat16": ("bf16", False, False),
    "bfloat16, channels_last": ("bf16", True, False),
    "bfloat16, compiled": ("bf16", False, True),
    "bfloat16, channels_last, compiled": ("bf16", True, True),
}
"""Precision of products, whether weights lie channels_last, whether networks are compiled."""


def steps_of(
    base: nn.Module, device: str, batch: int, mode: tuple[Precision, bool, bool]
) -> Iterator[Record]:
    """Steps of SiD on copies of `base`."""
    precision, turned, compiled = mode
    net, teacher = deepcopy(base), deepcopy(base)
    for each in (net, teacher) if turned else ():
        prepare_convolutions(each, torch.device(device), precision)
    state = State.init(SiD(), teacher, net)
    for each in (*state.nets.values(), teacher) if compiled else ():
        compile_calls(each)
    settings: dict[str, Any] = {"batch": batch, "steps": 10**6, "optim": Optim(1e-5)}
    source = Latents((3, 32, 32))
    return train(SiD(), teacher, net, source, precision=precision, state=state, **settings)


def speed(device: str, channels: int, batch: int) -> None:
    """SiD steps on DDPM++ in all modes; time and peak memory."""
    base = unet(device, channels)
    for name, mode in MODES.items():
        if mode[2] and device == "cpu":
            continue
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps = steps_of(base, device, batch, mode)
        try:
            each = timed(lambda run=steps: next(run), device, 8)
        except Exception as error:  # a mode that does not run is a result too
            print(f"FAIL  SiD step, {name}: {type(error).__name__}: {error}")
            FAILED.append(name)
            continue
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        print(f"      SiD step, {name}, batch {batch}: {each:.1f} ms, peak {peak:.2f} GiB")


def waits(channels: int) -> None:
    """How often the host waits for the GPU in a warm step of two turns: once in each."""
    steps = steps_of(unet("cuda", channels), "cuda", 4, MODES["bfloat16"])
    for _ in range(3):
        next(steps)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        next(steps)
    torch.cuda.set_sync_debug_mode("default")
    for each in told:
        print(f"      waits at {each.filename}:{each.lineno}")
    check("waits of a step beyond one a turn", len(told) - 2, 0)


def main(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; benchmarks/gpu.sh cpu tries the script itself")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"torch {torch.__version__} on {name}")
    same_as_cpu(device)
    big = device == "cuda"
    speed(device, channels=128 if big else 16, batch=64 if big else 2)
    if big:
        waits(channels=32)
    if FAILED:
        raise SystemExit(f"failed: {', '.join(FAILED)}")


if __name__ == "__main__":
    main(sys.argv[1])
