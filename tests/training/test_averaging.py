"""Gradients are averaged while others are made: same bits as afterwards, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.training import averaging as module, distributed
from fewstep.training.averaging import averaging, reached
from tests.processes import results


def test_reached_are_the_leaves_of_the_graph() -> None:
    a, b, c, d = (torch.ones(2, requires_grad=True) for _ in range(4))
    loss = (a * b.detach() + c.view(1, 2)).sum() + (d * 0).detach().sum()
    assert reached(loss) == {id(a), id(c)}
    assert reached(d.detach()) == set()


class Chain(nn.Module):
    """Six layers one after another; a parameter that is added to its only sample; one unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.place = nn.Parameter(torch.randn(1, 5))
        self.layers = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(6))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, skipped: int = -1) -> Tensor:
        x = x + self.place
        for number, layer in enumerate(self.layers):
            x = x if number == skipped else layer(x.sin())
        return x


def part(rank: int, number: int) -> Tensor:
    return torch.randn(1, 5, generator=torch.Generator().manual_seed(10 * rank + number))


def found(net: nn.Module) -> list[Any]:
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def chains() -> Any:
    """Gradients averaged while they are made, afterwards, and on paper; what was sent when."""
    with distributed.process_group():
        rank, ranks = distributed.rank(), distributed.world_size()
        distributed.BUCKET = 25
        sent: list[str] = []
        send = module._Queue._send

        def noted(queue: Any) -> None:
            sent.append(",".join(names[id(p)] for p in queue.parts[queue.sent]))
            send(queue)

        ends = []
        for overlapped in (True, False):
            net = Chain()
            names = {id(p): name for name, p in net.named_parameters()}
            module._Queue._send = noted  # type: ignore[method-assign]
            for number in (0, 1):  # rank 0 has no gradient of layer 3, but in the first part
                skipped = 3 if rank == 0 and number else -1
                loss = net(part(rank, number), skipped).square().sum()
                if number == 0:
                    loss.backward()
                elif overlapped:
                    with averaging(net, loss):
                        loss.backward()
                        sent.append("the end of the backward pass")
                else:
                    loss.backward()
                    with averaging(net, None):
                        pass
            ends.append(found(net))
        paper = Chain()
        for other in range(ranks):
            for number in (0, 1):
                skipped = 3 if other == 0 and number else -1
                (paper(part(other, number), skipped).square().sum() / ranks).backward()
        module._Queue._send = send  # type: ignore[method-assign]
        return ends, found(paper), sent


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Any]:
    return results(3, tmp_path_factory.mktemp("three"), chains)


def test_averages_are_those_of_sending_afterwards(three: Sequence[Any]) -> None:
    """To the bit, of three ranks; and those of one process to rounding."""
    for (during, after), paper, _ in three:
        assert [mean is None for mean in during] == [False, True, *[False] * 6]
        for ours, theirs, whole, first in zip(during, after, paper, three[0][0][0], strict=True):
            if ours is None:
                assert theirs is whole is None
                continue
            assert torch.equal(ours, theirs)
            assert torch.equal(ours, first)
            assert torch.allclose(ours, whole, rtol=1e-5, atol=1e-6)


def test_buckets_are_sent_from_the_end_before_it(three: Sequence[Any]) -> None:
    """All but the first layer's, whose gradient comes last: it is sent at the end or just before.

    Every rank has the same order, also the one that never waits for its third layer.
    """
    names = [f"layers.{n}.weight" for n in (5, 4, 3, 2, 1)]
    for _, _, sent in three:
        during, after = sent[:7], sent[7:]
        end = during.index("the end of the backward pass")
        assert end == 6
        assert during[:5] == names
        assert during[5] == "place,layers.0.weight"
        assert after == during[:6]


def test_one_process_sends_nothing() -> None:
    net = Chain()
    loss = net(part(0, 0)).sum()
    with averaging(net, loss):
        loss.backward()
    assert net.place.grad is not None
    assert net.unused.grad is None


def turned() -> Any:
    """Strides of a gradient that lies channels_last, and its values."""
    with distributed.process_group():
        conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.full((1, 2, 3, 3), 1.0 + distributed.rank())
        with averaging(conv, loss := conv(x).sum()):
            loss.backward()
        assert conv.weight.grad is not None
        assert conv.weight.grad.stride() == conv.weight.stride()
        return conv.weight.grad.unique().tolist(), conv.bias.grad.tolist()  # type: ignore[union-attr]


def test_averages_lie_as_their_weights_do(tmp_path: Path) -> None:
    """So that the optimiser is one pass (`fewstep.training.adam`)."""
    assert results(2, tmp_path, turned) == [([1.5], [1.0] * 3)] * 2


class Hidden(torch.autograd.Function):
    """A product whose backward pass adds to the gradient of a weight that its graph hides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter) -> Tensor:
        ctx.weight = weight
        return x * weight.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.enable_grad():
            (ctx.weight * grads[0].detach()).sum().backward()
        return grads[0], None


class Hiding(nn.Module):
    """Two weights; the graph shows the first."""

    def __init__(self) -> None:
        super().__init__()
        self.shown, self.hidden = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self) -> Tensor:
        return Hidden.apply(self.shown, _Box(self.hidden)).sum()  # type: ignore[no-any-return, no-untyped-call]


class _Box:
    """What autograd does not look into."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight

    def detach(self) -> Tensor:
        return self.weight.detach()

    def __mul__(self, other: Tensor) -> Tensor:
        return self.weight * other


def hiding() -> str:
    """What is said of a gradient that comes out of nowhere."""
    with distributed.process_group():
        net = Hiding()
        loss = net()
        with pytest.raises(RuntimeError, match="does not show") as caught, averaging(net, loss):
            loss.backward()
        return str(caught.value)


def test_a_gradient_that_the_graph_hides_is_noticed(tmp_path: Path) -> None:
    assert all("makes gradients by itself" in told for told in results(2, tmp_path, hiding))
