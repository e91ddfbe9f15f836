"""How often nets in parts are put together in a step, and their gradients shared out.

The processes of `fewstep.training.sharding` gather a unit of a net (FSDP2) before it is called,
take it apart after, gather it once more for its gradient, and share the gradient out:

    forward      gather    call       free
    backward     gather    gradient   free    scatter, if its weights are trained

A unit that is still whole is not gathered; the one that was called before is gathered ahead; what
recomputation calls stays whole until its gradient is there. `Watch` keeps these rules for nets
that are whole, on any device, so that a rehearsal on one process without numbers tells what is
sent by many. It notes the tensors that gradients are averaged of in whole nets, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fewstep.distillation.method import Turn
from fewstep.training.distributed import buckets
from fewstep.training.sharding import METHODS, require_parts, units

ALONE = ("", "grad_norm", "lr", "scale")
"""Keys of a turn's log that every process knows by itself."""


class Size(NamedTuple):
    """A tensor as it is cut: along its rows."""

    rows: int
    columns: int
    """Numbers of a row."""
    each: int
    """Bytes of a number."""

    @classmethod
    def of(cls, tensor: Tensor) -> Size:
        """The size of a tensor."""
        rows = tensor.shape[0] if tensor.ndim else 1
        return cls(rows, tensor.numel() // max(1, rows), tensor.element_size())

    def bytes(self, parts: int = 1) -> int:
        """Bytes of all parts, which are equally long: the last ones are filled up."""
        return -(-self.rows // parts) * parts * self.columns * self.each


@dataclass(frozen=True)
class Message:
    """Tensors that are sent together.

    kind: "gather" and "scatter" a unit of a net in parts; "average" gradients of a whole net, and
    "mask" which of them there are; "norm" of each gradient in parts; "logs" of either.
    """

    kind: Literal["gather", "scatter", "average", "mask", "norm", "logs"]
    net: str
    tensors: tuple[Size, ...]

    def bytes(self, parts: int = 1) -> int:
        """Bytes of all of it, where each of `parts` processes has one part."""
        return sum(size.bytes(parts) for size in self.tensors)


class Watch:
    """Counts the messages of nets while they are called: `sent`.

    nets: all that are cut into parts, by name. ValueError where one cannot be.
    """

    def __init__(self, nets: Mapping[str, nn.Module]) -> None:
        self.sent: Counter[Message] = Counter()
        for name, net in nets.items():
            require_parts(net)
            _Net(name, net, self.sent)

    def averages(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Note from now on what is averaged before each update of a net."""

        def before(*_: Any) -> None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            self.sent[Message("mask", name, (Size(len(grads), 1, 1),))] += 1
            present = [grad for grad in grads if grad is not None]
            self.sent[Message("norm", name, (Size(len(present), 1, 4),))] += 1
            for bucket in buckets(present):
                self.sent[Message("average", name, tuple(map(Size.of, bucket)))] += 1

        optimizer.register_step_pre_hook(before)

    def logs(self, turns: Sequence[Turn], logs: Iterable[str]) -> None:
        """Note what was logged in a step: the mean of each number, together for each turn."""
        own = Counter(
            name for name, _, key in (log.partition("/") for log in logs) if key not in ALONE
        )
        for turn in turns:
            if own[turn.net]:
                self.sent[Message("logs", turn.net, (Size(own[turn.net], 1, 4),))] += 1


class _Net:
    """A net: its units, in the order in which they were called since the last gradient."""

    def __init__(self, name: str, net: nn.Module, sent: Counter[Message]) -> None:
        self.name, self.sent = name, sent
        self.called: list[_Unit] = []
        self.ending = False
        self.units, taken = list[_Unit](), set[int]()
        for module in units(net):
            own = [p for p in module.parameters() if id(p) not in taken]
            taken |= {id(p) for p in own}
            self.units.append(_Unit(self, module, own))
        for method in METHODS:
            if hasattr(net, method):
                setattr(net, method, partial(self._called, getattr(net, method), net))
        net.unshard = None  # type: ignore[assignment]  # by which others know a net in parts

    def _called(self, method: Callable[..., Any], net: nn.Module, *args: Any, **named: Any) -> Any:
        root = self.units[-1]
        args, named = root.begins(net, args, named)
        return root.ends(net, args, method(*args, **named))

    def end_later(self) -> None:
        """Have everything taken apart at the end of this backward pass."""
        if not self.ending:
            self.ending = True
            Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        for unit in self.units:
            if unit.phase != "after":
                unit.shared()
            unit.phase, unit.backward, unit.state = "idle", False, _settled(unit.state)
            unit.places.clear()
        self.called.clear()
        self.ending = False


State = Literal["parts", "ahead", "whole"]


def _settled(state: State) -> State:
    return "parts" if state == "ahead" else state


class _Unit:
    """A module that is gathered by itself, and what it is doing."""

    def __init__(self, net: _Net, module: nn.Module, own: list[nn.Parameter]) -> None:
        self.net, self.own = net, own
        self.state: State = "parts"
        self.phase: Literal["idle", "forward", "backward", "after"] = "idle"
        self.backward = False
        """Whether a gradient of it has come in this pass."""
        self.places: list[int] = []
        self.fresh: dict[int, Size] = {}
        module.register_forward_pre_hook(self.begins, prepend=True, with_kwargs=True)
        module.register_forward_hook(self.ends)
        for number, p in enumerate(own):
            if p.requires_grad or p.is_leaf:
                self._note(number, p)

    def _note(self, number: int, p: nn.Parameter) -> None:
        def grown(p: Tensor) -> None:
            self.fresh[number] = Size.of(p)

        wanted = p.requires_grad
        p.requires_grad_(True).register_post_accumulate_grad_hook(grown)
        p.requires_grad_(wanted)

    def begins(self, _: nn.Module, args: Any, named: Any) -> tuple[Any, Any]:
        """Before a call."""
        if self.backward:
            self._gather("whole")
            return args, named
        first, self.phase = self.phase != "forward", "forward"
        self._gather("whole")
        if first and torch.is_grad_enabled():
            leaves, shape = tree_flatten((args, named))
            where = [i for i, leaf in enumerate(leaves) if _grows(leaf)]
            if where:
                passed = _End.apply(self, *(leaves[i] for i in where))  # type: ignore[no-untyped-call]
                for i, leaf in zip(where, passed, strict=True):
                    leaves[i] = leaf
                args, named = tree_unflatten(leaves, shape)
        return args, named

    def ends(self, _: nn.Module, __: Any, out: Any) -> Any:
        """After a call."""
        if self.backward:
            return out
        if torch._C._current_graph_task_id() == -1:  # else it is computed again for its gradient
            self._free()
            self.places.append(len(self.net.called))
            self.net.called.append(self)
        self.phase = "idle"
        if torch.is_grad_enabled():
            for leaf in tree_leaves(out):
                if _grows(leaf):
                    leaf.register_hook(self._grad)
        return out

    def _grad(self, _: Tensor) -> None:
        """As the gradient of an output comes."""
        self.backward = True
        self.net.end_later()
        if self.phase == "backward":
            return
        self.phase = "backward"
        self._gather("whole")
        if self.places and (place := self.places.pop()) > 0:
            self.net.called[place - 1]._gather("ahead")

    def shared(self) -> None:
        """As the gradients of all inputs, and of its weights, are there."""
        self.phase = "after"
        self._free()
        if self.fresh:
            sizes = tuple(size for _, size in sorted(self.fresh.items()))
            self.net.sent[Message("scatter", self.net.name, sizes)] += 1
            self.fresh.clear()

    def _gather(self, state: State) -> None:
        if self.state == "parts" and self.own:
            self.net.sent[Message("gather", self.net.name, tuple(map(Size.of, self.own)))] += 1
        if self.state == "parts" or state == "whole":
            self.state = state

    def _free(self) -> None:
        if self.state == "whole":
            self.state = "parts"


def _grows(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


class _End(torch.autograd.Function):
    """Nothing, but for word when the gradients of all its tensors are there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(unit: _Unit, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.unit = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        ctx.unit.shared()
        return None, *grads

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> tuple[Any, ...]:
        return tangents
