"""The account of tensors without numbers, against sums done by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fewstep.plan.ledger import META, AsOn, Ledger

N = 1000


def test_storages_are_entered_once_and_struck_out() -> None:
    """Views share their storage; what autograd keeps lives until the backward pass."""
    with Ledger() as ledger:
        a = torch.empty(N, N, device=META)
        assert ledger.live == 4 * N * N
        b, c = a.view(-1), a.T.detach()
        del a
        assert ledger.live == 4 * N * N
        w = nn.Parameter(torch.empty(N, N, device=META))
        y = (c @ w).exp()
        assert ledger.live == 3 * 4 * N * N  # exp keeps its result, the product is gone
        assert ledger.peak == 4 * 4 * N * N
        loss = y.sum()
        del y
        assert ledger.live == 3 * 4 * N * N + 4
        loss.backward()
        assert ledger.live == 3 * 4 * N * N + 4  # the gradient in place of the result
        del b, c, loss
        w.grad = None
        assert ledger.live == 4 * N * N


def test_operations_of_a_product() -> None:
    """2 m n k forward, and as much again for each of its two gradients."""
    with Ledger() as ledger:
        x = torch.empty(8, 16, device=META, requires_grad=True)
        layer = nn.Linear(16, 32, bias=False, device=META)
        y = layer(x)
        assert ledger.operations == 2 * 8 * 16 * 32
        y.sum().backward()
        assert ledger.operations == 3 * 2 * 8 * 16 * 32


def test_attention_keeps_no_matrix_of_all_pairs() -> None:
    """Each of q, k, v, out is (2, 4, N, 8); a matrix of pairs would be N / 8 times as large."""
    with Ledger() as ledger, AsOn(None, wide=True):
        q = torch.empty(2, 4, N, 8, device=META, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).sum().backward()
        assert ledger.peak < 8 * q.nbytes
        # 2 products forward; backward these again and 4 for the gradients, less one: 2.5 times
        assert ledger.operations == 3.5 * 2 * 2 * 2 * 4 * N * N * 8


def test_autocast_lowers_products_and_casts_a_trained_weight_once() -> None:
    with Ledger() as ledger, AsOn(torch.bfloat16, wide=True):
        layer = nn.Linear(N, N, bias=False, device=META)
        x = torch.empty(2, N, device=META)
        before = ledger.live
        y, z = layer(x), layer(x)
        assert (y.dtype, F.layer_norm(y, (N,)).dtype) == (torch.bfloat16, torch.float32)
        assert ledger.live - before == 2 * N * N + 4 * 2 * 2 * N  # the weight; x, x, y and z
        layer.requires_grad_(False)
        x.requires_grad_(True)
        before = ledger.live
        y, z = layer(x), layer(x)
        assert ledger.live - before >= 2 * 2 * N * N - 2 * N * N  # cast in each call
    with AsOn(torch.bfloat16, wide=False):
        assert F.layer_norm(y, (N,)).dtype is torch.bfloat16
    del z


def test_what_is_read_off_is_some_number() -> None:
    with Ledger():
        t = torch.empty(3, device=META)
        assert float(t.sum()) == 1.0
        assert t.tolist() == [1.0, 1.0, 1.0]
