"""The account of tensors without numbers, against sums done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewstep.plan import meta_memory
from fewstep.plan.meta_memory import META, AsOnDevice, MetaMemory

N = 1000


def test_storages_are_entered_once_and_struck_out() -> None:
    """Views share their storage; what autograd keeps lives until the backward pass."""
    with MetaMemory() as account:
        a = torch.empty(N, N, device=META)
        assert account.live == 4 * N * N
        b, c = a.view(-1), a.T.detach()
        del a
        assert account.live == 4 * N * N
        w = nn.Parameter(torch.empty(N, N, device=META))
        y = (c @ w).exp()
        assert account.live == 3 * 4 * N * N  # exp keeps its result, the product is gone
        assert account.peak == 4 * 4 * N * N
        loss = y.sum()
        del y
        assert account.live == 3 * 4 * N * N + 4
        loss.backward()
        assert account.live == 3 * 4 * N * N + 4  # the gradient in place of the result
        del b, c, loss
        w.grad = None
        assert account.live == 4 * N * N


def test_operations_of_a_product() -> None:
    """2 m n k forward, and as much again for each of its two gradients."""
    with MetaMemory() as account:
        x = torch.empty(8, 16, device=META, requires_grad=True)
        layer = nn.Linear(16, 32, bias=False, device=META)
        y = layer(x)
        assert account.operations == 2 * 8 * 16 * 32
        y.sum().backward()
        assert account.operations == 3 * 2 * 8 * 16 * 32


def test_attention_keeps_no_matrix_of_all_pairs() -> None:
    """Each of q, k, v, out is (2, 4, N, 8); a matrix of pairs would be N / 8 times as large."""
    with MetaMemory() as account, AsOnDevice(None, wide=True):
        q = torch.empty(2, 4, N, 8, device=META, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).sum().backward()
        assert account.peak < 8 * q.nbytes
        # 2 products forward; backward these again and 4 for the gradients, less one: 2.5 times
        assert account.operations == 3.5 * 2 * 2 * 2 * 4 * N * N * 8


def test_autocast_lowers_products_and_casts_a_trained_weight_once() -> None:
    with MetaMemory() as account, AsOnDevice(torch.bfloat16, wide=True):
        layer = nn.Linear(N, N, bias=False, device=META)
        x = torch.empty(2, N, device=META)
        before = account.live
        y, z = layer(x), layer(x)
        assert (y.dtype, F.layer_norm(y, (N,)).dtype) == (torch.bfloat16, torch.float32)
        assert account.live - before == 2 * N * N + 4 * 2 * 2 * N  # the weight; x, x, y and z
        layer.requires_grad_(False)
        x.requires_grad_(True)
        before = account.live
        y, z = layer(x), layer(x)
        assert account.live - before >= 2 * 2 * N * N - 2 * N * N  # cast in each call
    with AsOnDevice(torch.bfloat16, wide=False):
        assert F.layer_norm(y, (N,)).dtype is torch.bfloat16
    del z


def test_what_is_read_off_is_some_number() -> None:
    with MetaMemory():
        t = torch.empty(3, device=META)
        assert float(t.sum()) == 1.0
        assert t.tolist() == [1.0, 1.0, 1.0]


def test_shapes_that_are_known_give_the_same_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak, rest and operations with outcomes found before, found now, and never kept."""

    def totals() -> tuple[int, int, int]:
        with MetaMemory() as kept, AsOnDevice(torch.bfloat16, True):
            with torch.device("meta"):
                conv, norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
                net = nn.Sequential(conv, norm, nn.SiLU(), nn.Flatten(), nn.Linear(2048, 5))
                x = torch.zeros(4, 3, 16, 16)
            y = net(x).float().softmax(1)
            (y.square().mean() + y.view(5, 4).std()).backward()
        return kept.peak, kept.live, kept.operations

    monkeypatch.setattr(meta_memory, "_outcomes", {})
    found, calls = totals(), len(meta_memory._outcomes)
    again = totals()
    assert calls == len(meta_memory._outcomes) > 20  # nothing new came
    assert any(known is not None for known in meta_memory._outcomes.values())
    monkeypatch.setattr(meta_memory, "_is_fresh", lambda func: False)
    assert found == again == totals()
    assert min(found) > 0


def test_what_shares_a_storage_is_not_remembered() -> None:
    """A view whose schema says nothing of it stays a view."""
    x = torch.zeros(6, device="meta")
    for _ in range(2):
        view, _ = meta_memory.outcome(torch.ops.aten._unsafe_view.default, (x, [2, 3]), {})
        assert view.untyped_storage()._cdata == x.untyped_storage()._cdata


class Plain(torch.Tensor):
    """A tensor of a name of its own, such as one that adapters share."""


def test_what_is_alike_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists, answers that are in part not asked for, and plain subclasses; with operations."""
    monkeypatch.setattr(meta_memory, "_outcomes", {})
    aten, x = torch.ops.aten, torch.zeros(2, 4, 3, 3, device="meta")
    weight, mean = torch.zeros(4, device="meta"), torch.zeros(2, 2, device="meta")
    norm = (x, x, mean, mean, weight, 2, 4, 9, 2, [True, False, False])
    conv = (x.as_subclass(Plain), torch.zeros(5, 4, 3, 3, device="meta"), None)
    calls: list[tuple[Any, Any, Any]] = [
        (aten._foreach_sqrt.default, ([x, weight],), [(2, 4, 3, 3), (4,)]),
        (aten.native_group_norm_backward.default, norm, ((2, 4, 3, 3), None, None)),
        (
            aten.convolution.default,
            (*conv, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
            (2, 5, 1, 1),
        ),
    ]
    for func, args, shapes in calls:
        done: list[object] = []

        class Counted:
            _schema, _overloadpacket = func._schema, func._overloadpacket

            def __call__(self, *given: Any, func: Any = func, done: list[object] = done) -> Any:
                done.append(given)
                return func(*given)

        counted, answers = Counted(), []
        for _ in range(3):
            with torch._C.DisableTorchFunction():
                out, operations = meta_memory.outcome(counted, args, {})
            answers.append(out)
            assert operations == (2 * 2 * 5 * 4 * 9 if func is aten.convolution.default else 0)
            parts = [out] if isinstance(out, torch.Tensor) else out
            sizes = [None if part is None else tuple(part.shape) for part in parts]
            assert sizes == ([shapes] if isinstance(out, torch.Tensor) else [*shapes])
            assert isinstance(out, (torch.Tensor, type(shapes)))
        assert len(done) == 1
        assert answers[0] is not answers[1]


def test_an_optimisers_step_has_nothing_to_do_without_numbers() -> None:
    """Where all are on "meta"; numbers that are there are changed."""
    twice = torch.ops.aten._foreach_mul_.Scalar
    with MetaMemory() as kept:
        x = [torch.zeros(3, device="meta"), torch.zeros(4, device="meta")]
        live = kept.live
        torch._foreach_mul_(x, 2.0)
        assert (kept.live, kept.peak) == (live, 4 * 7)
        there = [torch.ones(3)]
        torch._foreach_mul_(there, 2.0)
    assert there[0].tolist() == [2.0] * 3
    assert meta_memory.outcome(twice, (x, 2.0), {}) == (None, 0)
