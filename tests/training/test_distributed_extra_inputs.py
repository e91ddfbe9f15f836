"""Further inputs of a network in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.derivative import difference_step, jvp
from fewstep.diffusion.extra_inputs import ExtraInputs
from fewstep.training import distributed
from fewstep.training.sharding import shard
from tests.networks import NETS, samples, stirred
from tests.processes import results

pytestmark = pytest.mark.slow


def ran(sharded: bool) -> dict[str, Tensor]:
    """Prediction, features, gradients, and a derivative in both ways."""
    with distributed.process_group():
        net: Any = stirred(ExtraInputs(stirred(NETS["mlp"]()), ("s",)))
        if sharded:
            shard(net)
        xt, t, cond, s = samples(net)
        out, features = net.forward_with_features(xt, t, cond, s=s)
        out.square().mean().backward()
        found = {"out": out, "features": features, "encoded": net.encode(xt, t, cond, s=s)}
        differences: Any = {"how": "difference", "h": difference_step(net.path, t)}
        for name, how in {"forward": {}, "difference": differences}.items():
            _, found[name] = jvp(lambda t: net(xt, t, cond, s=s), [t], [1.0], net=net, **how)
        found["again"] = net(xt, t, cond, s=s)
        gradients = {f"d {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
        return {k: distributed.full_tensor(v).detach() for k, v in (found | gradients).items()}


def test_in_parts_they_are_the_same(tmp_path: Path) -> None:
    expected = ran(False)
    for found in results(2, tmp_path, ran, True):
        assert found.keys() == expected.keys()
        assert len(found) > 20
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
