"""Randomness as a pure function of (seed, purpose, sample index).

Training draws nothing from a global generator. Sample number n of a run gets its noise, its
time and its label by encrypting n with a key made of the seed and the purpose ("z", "t", ...)
with the counter-based generator Philox4x32-10 (Salmon et al. 2011,
https://doi.org/10.1145/2063384.2063405). Hence sample n is the same whatever the batch size,
the accumulation or the number of processes; a resumed run needs to remember one integer; and
CPU and GPU draw the same bits.

Numbers in main memory are drawn by numpy, whose calls cost a fraction of torch's; on other
devices, and where tensors are traced or transformed, the same rounds are operations of torch.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_FACTORS = np.array(_MULTIPLIERS, np.uint64)[:, None, None]
_PART = 1 << 14
"""Counters that numpy encrypts at once: as many as stay in a processor's cache."""

Words = np.ndarray[Any, np.dtype[np.uint32]]


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10, a counter-based generator (Salmon et al. 2011).

    counter: four int64 tensors that hold 32-bit words, of shapes that broadcast; key: two 32-bit
    words. Returns four tensors of their common shape. https://doi.org/10.1145/2063384.2063405
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    even, odd = torch.stack([c0, c2]), torch.stack([c3, c1])
    pair = torch.arange(2, device=even.device).reshape(2, *[1] * c0.ndim)
    rounds = torch.arange(10, device=even.device).reshape(10, 1, *[1] * c0.ndim)
    factors, steps, start = (_both(pair, words) for words in (_MULTIPLIERS, _WEYL, key))
    for keys in (start + rounds * steps) & _MASK:
        product = even * factors
        even, odd = ((product >> 32) ^ odd).flip(0) & _MASK ^ keys, product & _MASK
    return even[0], odd[1], even[1], odd[0]


def _both(pair: Tensor, words: tuple[int, int]) -> Tensor:
    """Two words where `pair` is 0 and 1, made on its device: a copy from the host would wait."""
    return pair * (words[1] - words[0]) + words[0]


def _round_keys(key: tuple[int, int]) -> list[tuple[int, int]]:
    """The keys of the ten rounds: each grows by a constant of its own, modulo 2^32."""
    a, b = key
    return [((a + r * _WEYL[0]) & _MASK, (b + r * _WEYL[1]) & _MASK) for r in range(10)]


@lru_cache(maxsize=256)
def _round_key_arrays(key: tuple[int, int]) -> tuple[Words, ...]:
    """`_round_keys`, each as an array (2, 1, 1)."""
    return tuple(np.array(_round_keys(key), np.uint32)[:, :, None, None])


def _philox_rows(block: Words, low: Words, high: Words, key: tuple[int, int], out: Any) -> None:
    """`philox` of the counter (block, low, high, 0), in numpy: the same bits.

    block: (1, N); low, high: (B, 1); out: (B, N, 4), written in place. A product of 64 bits is
    read as two words where it lies, so that a round is three passes over the numbers.
    """
    even = np.empty((2, len(low), block.shape[1]), np.uint32)
    even[0], even[1] = block, high
    products = [np.empty(even.shape, np.uint64) for _ in range(2)]
    halves = [p.view(np.uint32) for p in products]  # low word, high word, low word, ...
    odd = np.zeros_like(even)
    odd[1] = low
    for r, keys in enumerate(_round_key_arrays(key)):
        half = halves[r % 2]
        np.multiply(even, _FACTORS, out=products[r % 2])
        np.bitwise_xor(half[::-1, :, 1::2], odd[::-1], out=even)
        np.bitwise_xor(even, keys, out=even)
        odd = half[:, :, ::2]
    out[..., 0], out[..., 1], out[..., 2], out[..., 3] = even[0], odd[1], even[1], odd[0]


def _words_on_host(index: Tensor, blocks: int, key: tuple[int, int]) -> Tensor:
    """(B, 4 blocks) words of the samples `index`, computed in numpy part by part."""
    halves = np.ascontiguousarray(index.numpy()).view(np.uint32)
    low, high = halves[::2, None], halves[1::2, None]
    block = np.arange(blocks, dtype=np.uint32)[None]
    out = np.empty((len(low), blocks, 4), np.int64)
    columns = max(1, min(blocks, _PART))
    rows = _PART // columns
    for i in range(0, len(low), rows):
        some = slice(i, i + rows)
        for j in range(0, blocks, columns):
            part = slice(j, j + columns)
            _philox_rows(block[:, part], low[some], high[some], key, out[some, part])
    return torch.from_numpy(out.reshape(len(low), 4 * blocks))


def _is_plain(index: Tensor) -> bool:
    """Whether numpy may read `index`: in main memory, and neither traced nor transformed."""
    return (
        type(index) is Tensor
        and index.device.type == "cpu"
        and index.dtype == torch.int64
        and sys.byteorder == "little"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_functorch_wrapped_tensor(index)
    )


@dataclass(frozen=True)
class Draws:
    """The random numbers of the samples `index`, as a pure function of seed and purpose.

    Attributes:
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
        blocks = -(-count // 4)
        if _is_plain(self.index):
            return _words_on_host(self.index, blocks, key)[:, :count]
        block = torch.arange(blocks, device=self.index.device)[None]
        low, high = (self.index & _MASK)[:, None], ((self.index >> 32) & _MASK)[:, None]
        words = philox((block, low, high, torch.zeros_like(low)), key)
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
