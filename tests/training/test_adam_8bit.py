"""Moments of eight bits: their codes and updates by hand, and what training with them reaches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batches import Latents
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch
from fewstep.methods.sid import SiD
from fewstep.nets.lora import LoRA
from fewstep.nets.mlp import MLP
from fewstep.storage import checkpoint
from fewstep.training.adam_8bit import BLOCK, MOMENTS, SMALLEST, Adam8
from fewstep.training.loop import State, train
from fewstep.training.optim import Optim

pytest.importorskip("bitsandbytes")

Bits = Literal[32, 8]
LR, BETAS, EPS = 0.1, (0.9, 0.99), 1e-8
F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(signed: bool) -> Tensor:
    """The 256 values as `fewstep.training.adam_8bit` tells them."""
    values = [0.0, 1.0]
    for e in range(7):
        parts = 2 ** (6 - e) * (1 if signed else 2)
        middles = [0.1 + 0.9 * (k + 0.5) / parts for k in range(parts)]
        values += [sign * 10.0**-e * f for f in middles for sign in ((1, -1) if signed else (1,))]
    return torch.tensor(sorted(values), dtype=F64)


def test_the_codes_are_those_of_the_paper() -> None:
    optimizer = Adam8([nn.Parameter(normal(1))], LR, BETAS, EPS)
    for signed, found in zip((True, False), optimizer.codes, strict=True):
        assert len(set(found.tolist())) == len(codes(signed)) == 256
        torch.testing.assert_close(found.double(), codes(signed), rtol=1e-6, atol=1e-12)
        near_one = codes(signed)[codes(signed) > 0.1].diff().max() / 2
        assert float(near_one) == pytest.approx(0.0070 if signed else 0.0035, abs=4e-5)


def dequantised(state: dict[str, Tensor], name: str) -> Tensor:
    largest = state[f"{name}_max"].double().repeat_interleave(BLOCK)[: state[name].numel()]
    return codes(name == "exp_avg")[state[name].long()] * largest


def uncertainty(moment: Tensor, signed: bool) -> Tensor:
    """How far the nearest code is from each number, and 2^-15 of the block's largest more.

    For on a CPU the library finds codes in a table of 2^16 cells between -1 and 1.
    """
    found = []
    for block in moment.split(BLOCK):
        n = block.abs().max()
        found.append(((block[:, None] / n - codes(signed)).abs().amin(1) + 2**-15) * n)
    return torch.cat(found)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_updates_by_hand(decay: float) -> None:
    """Of 5,000 weights, whose last block is not whole: Adam's, from the moments as they are.

    Negative control: from the moments before they were quantised it is another update.
    """
    start, (b1, b2) = normal(5000), BETAS
    p = nn.Parameter(start.clone())
    optimizer = Optim(LR, BETAS, EPS, decay, bits=8).build([p])
    m = v = exact_m = exact_v = torch.zeros(5000, dtype=F64)
    for n in (1, 2, 3):
        g = p.grad = normal(5000, seed=n)
        before = p.detach().double() * (1 - LR * decay)
        optimizer.step()
        moved = before - p.detach().double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.double() ** 2
        exact_m, exact_v = b1 * exact_m + (1 - b1) * g, b2 * exact_v + (1 - b2) * g.double() ** 2

        def adam(m: Tensor, v: Tensor, n: int = n) -> Tensor:
            return LR * m / (1 - b1**n) / ((v / (1 - b2**n)).sqrt() + EPS)

        torch.testing.assert_close(moved, adam(m, v), rtol=1e-5, atol=1e-6)
        off = (moved - adam(exact_m, exact_v)).abs().max() / LR
        assert off < 1e-5 if n == 1 else 0.02 < off < 0.2
        state = optimizer.state[p]
        stored = [dequantised(state, name) for name in MOMENTS]
        for found, moment, signed in zip(stored, (m, v), (True, False), strict=True):
            assert ((found - moment).abs() <= 1.001 * uncertainty(moment, signed)).all()
        m, v = stored


def test_small_tensors_and_zeros() -> None:
    """Below 4,096 numbers the update is AdamW's; weights without gradient stay where they are."""
    ends = []
    for bits in (32, 8):
        p = nn.Parameter(normal(SMALLEST - 1))
        optimizer = Optim(LR, BETAS, EPS, 0.1, bits=bits).build([p])  # type: ignore[arg-type]
        for k in range(3):
            p.grad = normal(SMALLEST - 1, seed=k)
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)
    still = nn.Parameter(normal(SMALLEST))
    optimizer = Optim(LR, BETAS, EPS, bits=8).build([still])
    for _ in range(2):
        still.grad = torch.zeros(SMALLEST)
        still.grad[SMALLEST // 2 :] = 1.0
        optimizer.step()
    assert torch.equal(still[: SMALLEST // 2], normal(SMALLEST)[: SMALLEST // 2])
    torch.testing.assert_close(still[-9:], normal(SMALLEST)[-9:] - 2 * LR, rtol=0, atol=0.02 * LR)


def test_the_order_of_memory_does_not_matter() -> None:
    """Weights and gradients with channels last, and as they are usually."""
    ends = []
    for order in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(normal(32, 16, 3, 3).to(memory_format=order))
        optimizer = Optim(LR, BETAS, EPS, bits=8).build([p])
        for k in range(3):
            p.grad = normal(32, 16, 3, 3, seed=k).to(memory_format=order)
            optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_the_memory_of_moments() -> None:
    """One byte a number, and four a block: 2 (1 + 4/256) bytes a weight, where Adam has 8."""
    sizes = {}
    for bits in (32, 8):
        p = nn.Parameter(normal(64, 4096))
        p.grad = torch.ones_like(p)
        optimizer = Optim(betas=(0.9, 0.999), bits=bits).build([p])  # type: ignore[arg-type]
        optimizer.step()
        sizes[bits] = sum(t.nbytes for t in optimizer.state[p].values() if t.ndim) / p.numel()
    assert sizes == {32: 8.0, 8: 2.03125}


class Location(nn.Module):
    """The denoiser of N(m, 1/4) in 4,096 dimensions, of which m is learned."""

    path = VE()

    def __init__(self, m: Tensor) -> None:
        super().__init__()
        self.m = nn.Parameter(m)

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        variance = t[:, None] ** 2
        return (variance * self.m + xt / 4) / (variance + 1 / 4)


@pytest.mark.slow
def test_a_gaussian_is_distilled() -> None:
    """The mean of the student's samples is the teacher's, to 0.1 in each of 4,096 dimensions.

    The start is 1 away. What is left is noise of the last steps, of which the two ways of keeping
    moments have the most in common.
    """
    mu, ends = normal(SMALLEST), []
    for bits in (32, 8):
        optim = Optim(0.05, (0.0, 0.99), decay="linear", bits=bits)  # type: ignore[arg-type]
        nets = Location(mu), Location(torch.zeros(SMALLEST))
        settings: Any = {"batch": 8, "steps": 150, "optim": optim}
        *_, last = train(SiD(), *nets, Latents((SMALLEST,)), **settings)
        student: Any = last.state.nets["student"]
        ends.append(student.m.detach() * 2.5**2 / (2.5**2 + 1 / 4) - mu)
    rms = [float(end.square().mean().sqrt()) for end in (*ends, ends[0] - ends[1])]
    assert rms[0] < 0.1
    assert rms[1] < 1.1 * rms[0]
    assert 1e-3 < rms[2] < 0.5 * rms[0]


MODEL = Model(MLP(64, 1), (2,), classes=3, sigma_data=0.7)
SMOOTH: Any = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-3}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two parts": {"accumulate": 2},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "adapters": {"lora": LoRA(64, targets=("*",))},
    "offloaded": {"offload": True},
    "clipped": {"clip": 0.1, "weight_decay": 0.1},
}


def trained(bits: Bits, way: str, steps: int = 8) -> Iterator[tuple[State, dict[str, float]]]:
    """SiD on a teacher of random weights, and what each step logs."""
    settings: Any = {"batch": 16, "steps": steps, **WAYS[way]}
    teacher: Any = MODEL.build(1)
    for p in teacher.parameters():
        p.data += 0.1 * normal(*p.shape)
    lora = settings.pop("lora", None)
    net = MODEL.build(2) if lora is None else lora.adapt(teacher)
    names = ("offload", "clip", "weight_decay")
    told = {name: settings.pop(name) for name in names if name in settings}
    optim = Optim(**SMOOTH, **told, bits=bits)
    for record in train(SiD(), teacher, net, Latents((2,), 3), optim=optim, **settings):
        yield record.state, record.logs


@pytest.mark.parametrize("way", WAYS)
def test_training_is_nearly_that_with_32_bits(way: str) -> None:
    """The way that the weights go differs by 1 % to 4 % of its length, and not by nothing."""
    ends = []
    for bits in (32, 8):
        *_, (state, logs) = trained(bits, way)  # type: ignore[arg-type]
        assert logs["skipped"] == 0 or way == "fp16"
        entries = [entry for o in state.optimizers.values() for entry in o.state.values()]
        assert any(e["exp_avg"].dtype == torch.uint8 for e in entries) == (bits == 8)
        ends.append(torch.cat([p.detach().flatten() for p in state.nets.parameters()]))
    state, _ = next(trained(32, way))
    start = torch.cat([p.detach().flatten() for p in state.nets.parameters()])
    apart = float((ends[0] - ends[1]).norm() / (ends[0] - start).norm())
    assert 1e-4 < apart < 0.1


class Broken(Latents):
    """Noise of which the fourth batch is not a number."""

    def __call__(self, draws: Draws) -> Batch:
        batch = super().__call__(draws)
        return batch._replace(z=batch.z * torch.nan) if int(draws.index[0]) == 3 * 8 else batch


def test_a_skipped_update_leaves_the_moments() -> None:
    """The student's in the second step, to the bit; those of the fake score move."""
    seen = []
    settings: Any = {"batch": 8, "steps": 2, "optim": Optim(bits=8)}
    for record in train(SiD(), MODEL.build(1), MODEL.build(1), Broken((2,), 3), **settings):
        parts = checkpoint.tensors(record.state)
        seen.append({k: {n: t.clone() for n, t in parts[k].items()} for k in parts})
    assert record.logs["skipped"] == 1
    same = {k: all(torch.equal(seen[0][k][n], t) for n, t in seen[1][k].items()) for k in seen[1]}
    assert same["optim-student"]
    assert not same["optim-fake"]
