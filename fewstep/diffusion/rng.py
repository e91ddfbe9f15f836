"""Randomness as a pure function of (seed, purpose, sample index).

Training draws nothing from a global generator. Sample number n of a run gets its noise, its
time and its label by encrypting n with a key made of the seed and the purpose ("z", "t", ...)
with the counter-based generator Philox4x32-10 (Salmon et al. 2011,
https://doi.org/10.1145/2063384.2063405). Hence sample n is the same whatever the batch size,
the accumulation or the number of processes; a resumed run needs to remember one integer; and
CPU and GPU draw the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10, a counter-based generator (Salmon et al. 2011).

    counter: four int64 tensors that hold 32-bit words; key: two 32-bit words. Returns four tensors
    of the same shape. https://doi.org/10.1145/2063384.2063405
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32) & _MASK ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32) & _MASK ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Draws:
    """The random numbers of the samples `index`, as a pure function of seed and purpose.

    Fields:
        index: (B,) int64, the numbers of the samples.
        seed: the key of a run.
        prefix: put before every purpose (see `under`).

    Two draws under the same purpose are the same numbers; draws under different purposes are
    independent. Philox4x32-10, Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405.
    """

    index: Tensor
    seed: int = 0
    prefix: str = ""

    @classmethod
    def range(
        cls, start: int, count: int, seed: int = 0, device: torch.device | str = "cpu"
    ) -> Draws:
        """The draws of the samples start, ..., start + count - 1, with `index` on `device`."""
        return cls(torch.arange(start, start + count, device=device), seed)

    def under(self, name: str) -> Draws:
        """The same samples with every purpose renamed "name/purpose": a fresh set of draws."""
        return replace(self, prefix=f"{self.prefix}{name}/")

    def bits(self, purpose: str, count: int) -> Tensor:
        """(B, count) int64 words, each uniform on 0 .. 2^32 - 1."""
        text = f"{self.seed}:{self.prefix}{purpose}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
        block = torch.arange(-(-count // 4), device=self.index.device)[None]
        low, high = (self.index & _MASK)[:, None], ((self.index >> 32) & _MASK)[:, None]
        zero = torch.zeros_like(block + low)
        words = philox((zero + block, zero + low, zero + high, zero), key)
        return torch.stack(words, -1).flatten(1)[:, :count]

    def uniform(self, purpose: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B,) numbers strictly inside (0, 1), in steps of 2^-23."""
        return ((self.bits(purpose, 1)[:, 0] >> 9).to(dtype) + 0.5) * 2.0**-23

    def integers(self, purpose: str, high: int) -> Tensor:
        """(B,) int64 uniform on 0 .. high - 1 (up to a bias of high / 2^32)."""
        return (self.bits(purpose, 1)[:, 0] * high) >> 32

    def normal(
        self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(B, *shape) standard normal numbers, by the Box-Muller transform."""
        count = math.prod(shape)
        half = -(-count // 2)
        u = (self.bits(purpose, 2 * half).to(dtype) + 0.5) * 2.0**-32
        radius, angle = (-2 * u[:, :half].log()).sqrt(), 2 * math.pi * u[:, half:]
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return pairs[:, :count].reshape(len(self.index), *shape)
