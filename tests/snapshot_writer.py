"""Writes snapshots as EDM, EDM2 and SiD do, with names and opcodes of theirs and content of ours.

Their classes pickle as a call of `torch_utils.persistence._reconstruct_persistent_obj` on a
description that includes source code. Here stand-ins of those modules exist while writing; the
function screams if anybody calls it, and so would the source if anybody executed it.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

FORMATS = ("edm", "edm2", "state")
CANARY = "the source of a snapshot was executed"


class EasyDict(dict):  # type: ignore[type-arg]
    """Stands in for dnnlib's."""


def _reconstruct_persistent_obj(meta: object) -> None:
    raise AssertionError(CANARY)


@contextmanager
def pretended() -> Iterator[None]:
    """Within the block the modules that the pickles name can be found by the pickler."""
    homes = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
    names = {*homes, "torch_utils", "dnnlib"}
    assert not names & set(sys.modules)
    kept = {thing: (thing.__module__, thing.__qualname__) for thing in homes.values()}
    try:
        for name in names:
            sys.modules[name] = ModuleType(name)
        for name, thing in homes.items():
            thing.__module__ = name
            setattr(sys.modules[name], thing.__name__, thing)
        yield
    finally:
        for name in names:
            del sys.modules[name]
        for thing, (module, _) in kept.items():
            thing.__module__ = module


class Persistent:
    """An object that pickles like an instance of a persistent class."""

    def __init__(self, class_name: str, source: str, state: dict[str, Any]) -> None:
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct_persistent_obj, (self.meta,), None


def persistent(module: nn.Module, source: str, **init_kwargs: Any) -> Any:
    """A network as their snapshots hold it: layers persistent, containers of torch.nn plain."""
    state = {k: v for k, v in vars(module).items() if k.startswith("_") or type(v) in _PLAIN}
    state["_modules"] = {
        name: None if child is None else persistent(child, source)
        for name, child in module._modules.items()
    }
    if type(module) is nn.ModuleDict:
        container = nn.ModuleDict()
        vars(container).update(state)
        return container
    state |= {"_init_args": (), "_init_kwargs": init_kwargs}
    return Persistent(type(module).__name__, source, state)


_PLAIN = (bool, int, float, str, type(None))


def source(size: int = 30_000) -> str:
    """Python text that would be noticed, of about the size of the real one."""
    return f"raise AssertionError({CANARY!r})\nimport os\nos._exit(1)\n".ljust(size, "#")


def write(net: nn.Module, kwargs: dict[str, Any], kind: str, protocol: int = 4) -> bytes:
    """A snapshot (kind "edm" or "edm2") or training state ("state") of `net`."""
    text = source()
    ema = persistent(net, text, **kwargs)
    data = {"path": "data/cifar10.zip", "use_labels": False, "xflip": False, "cache": True}
    out = io.BytesIO()
    with pretended():
        if kind == "state":
            optimizer = torch.optim.Adam(net.parameters(), 1e-3)
            net.zero_grad()
            sum((p.square().sum() for p in net.parameters()), torch.zeros(())).backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.save({"net": ema, "optimizer_state": optimizer.state_dict()}, out)
            return out.getvalue()
        loss = Persistent("EDMLoss", text, {"P_mean": -1.2, "_init_args": (), "_init_kwargs": {}})
        if kind == "edm":
            pipe = {"xflip": np.float64(0.12), "_init_args": (), "_init_kwargs": {"xflip": 1e8}}
            augment = Persistent("AugmentPipe", text, pipe)
            tree = {"ema": ema, "loss_fn": loss, "augment_pipe": augment, "dataset_kwargs": data}
        else:
            arrays = {"scale": np.arange(4, dtype="f4"), "bias": np.ones((1, 4, 1, 1), "f4")}
            encoder = Persistent(
                "StabilityVAEEncoder", text, {**arrays, "_init_args": (), "_init_kwargs": {}}
            )
            tree = EasyDict(encoder=encoder, dataset_kwargs=EasyDict(data), loss_fn=loss, ema=ema)
        pickle.dump(tree, out, protocol)
    return out.getvalue()
