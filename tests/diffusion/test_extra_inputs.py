"""Further inputs of any network: nothing at the start, then what the formula says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.config import decode, encode, parse
from fewstep.diffusion.denoisers import Velocity
from fewstep.diffusion.extra_inputs import ExtraInputs, TimeEmbedding, time_embedding
from fewstep.diffusion.guidance import CFG, guided
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow
from fewstep.diffusion.samplers import Heun
from fewstep.methods.sid import SiD
from fewstep.nets.activation_checkpointing import has_blocks, recompute
from fewstep.nets.lora import LoRA
from fewstep.nets.mlp import MLP
from fewstep.storage import model_folder
from fewstep.storage.model_folder import load_student, save_student
from tests.networks import FLOW, NETS, samples, shape_of, stirred

each_net = pytest.mark.parametrize("name", NETS)


def calls(net: Any, *args: Any, **named: Any) -> list[Tensor]:
    """Prediction, features, and both from one pass."""
    with torch.no_grad():
        return [
            net(*args, **named),
            net.encode(*args, **named),
            *net.forward_with_features(*args, **named),
        ]


@each_net
def test_the_start_is_the_denoiser_inside_and_then_inputs_matter(name: str) -> None:
    """To the bit, features too, with inputs and without; trained weights change each input."""
    inside = stirred(NETS[name]()).eval()
    net: Any = ExtraInputs(inside, ("s", "w")).eval()
    assert (net.path, net.input_names) == (inside.path, ("s", "w"))
    xt, t, cond, s = samples(net, shape_of(name))
    w = torch.tensor(3.0)
    plain = calls(inside, xt, t, cond)
    for named in ({}, {"s": None}, {"s": s}, {"s": s, "w": w}, {"w": w}):
        assert all(map(torch.equal, calls(net, xt, t, cond, **named), plain)), named
    names = set(net.state_dict())
    assert {f"net.{key}" for key in inside.state_dict()} < names
    assert all(key.startswith(("net.", "embeddings.")) for key in names)
    stirred(net.embeddings)
    assert all(map(torch.equal, calls(net, xt, t, cond), plain))
    given = [calls(net, xt, t, cond, **named) for named in ({"s": s}, {"s": s / 2}, {"w": w})]
    for a, b in ((plain, given[0]), (given[0], given[1]), (plain, given[2])):
        assert all(float((x - y).abs().max()) > 1e-5 for x, y in zip(a, b, strict=True))
    copy = deepcopy(net)
    assert all(map(torch.equal, calls(copy, xt, t, cond, s=s), given[0]))
    stirred(net.embeddings)
    assert all(map(torch.equal, calls(copy, xt, t, cond, s=s), given[0]))
    assert all(map(torch.equal, calls(inside, xt, t, cond), plain)), "nothing is left behind"


@torch.no_grad()
def test_what_is_added_by_the_formula() -> None:
    """e + W2 silu(W1 [cos, sin](f u)), u the share of the path from s to t, or the number."""
    net: Any = stirred(ExtraInputs(NETS["mlp, vp"](), ("s", "steps")))
    xt, t, cond, s = samples(net)
    module, width = time_embedding(net)
    numbers = {"s": (t - s) / 999, "steps": torch.full((4,), 8.0)}
    added = torch.zeros(4, width)
    f = 2 * math.pi * 2.0 ** torch.linspace(-8, 1, 32)
    for name, u in numbers.items():
        part = net.embeddings.get_submodule(name)
        waves = torch.cat([(u[:, None] * f).cos(), (u[:, None] * f).sin()], 1)
        added += part.last(nn.functional.silu(part.first(waves)))
    found = net(xt, t, cond, s=s, steps=torch.tensor(8))
    without = net(xt, t, cond)
    module.register_forward_hook(lambda module, args, out: out + added)
    torch.testing.assert_close(found, net(xt, t, cond))
    assert float((found - without).abs().max()) > 1e-5


@pytest.mark.parametrize("path", [VE(), Flow(), VP()], ids=repr)
def test_the_end_of_the_path_is_finite(path: Any) -> None:
    """s = 0, where VE's label is infinite, is told as t_min."""
    net = stirred(ExtraInputs(Model(MLP(16, 1), (2,), 0, path, "v").build(), ("s",)))
    xt, t = torch.randn(3, 2), torch.full((3,), path.t_max / 2)
    out = net(xt, t, s=torch.tensor(0.0))
    assert bool(out.isfinite().all())
    torch.testing.assert_close(out, net(xt, t, s=torch.tensor(path.t_min)), rtol=0, atol=1e-4)


def test_inputs_are_added_to_those_that_are_there() -> None:
    first = stirred(ExtraInputs(FLOW.build(), ("w",)))
    both: Any = ExtraInputs(first, ("s",))
    assert both.input_names == ("w", "s")
    assert set(both.state_dict()) == set(replace(FLOW, inputs=("w", "s")).build().state_dict())
    xt, t, cond, s = samples(both)
    w = torch.tensor(2.0)
    assert torch.equal(both(xt, t, cond, w=w, s=s), first(xt, t, cond, w=w))


class Lone(nn.Module):
    """A user's own network, without a time embedding that it says."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.other, self.out = nn.Linear(1, 6), nn.Linear(1, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, label: Tensor, cond: Tensor | None = None) -> Tensor:
        out: Tensor = self.out(self.embed(label[:, None]).tanh()) + x
        return out


class Says(Lone):
    """One that says it, in as many words as it takes."""

    @property
    def time_embedding(self) -> tuple[nn.Module, int]:
        return self.embed, 6


class Attribute(Lone):
    """One that says it by an attribute, rightly or not."""

    def __init__(self, module: str, width: int) -> None:
        super().__init__()
        self.time_embedding = TimeEmbedding(getattr(self, module), width)


@torch.no_grad()
def test_a_network_of_ones_own() -> None:
    net = stirred(ExtraInputs(Velocity(Says(), Flow()), ("s",)))
    xt, t, s = torch.randn(3, 2), torch.tensor(0.7), torch.tensor([0.1, 0.2, 0.3])
    assert float((net(xt, t, s=s) - net(xt, t)).abs().max()) > 1e-3
    said = Velocity(Attribute("embed", 6), Flow())  # as an attribute, which is right here
    for each in (said, deepcopy(said), LoRA(2, targets=("*",)).adapt(said)):
        told = stirred(ExtraInputs(each, ("s",)))
        assert float((told(xt, t, s=s) - told(xt, t)).abs().max()) > 1e-3
        assert torch.equal(deepcopy(told)(xt, t, s=s), told(xt, t, s=s))
    for wrong, words in {
        Attribute(
            "embed", 5
        ): r"time_embedding says that Linear returns \(B, 5\), but it returned "
        r"\(3, 6\)",
        Attribute(
            "other", 6
        ): "time_embedding says that Linear embeds the time, but the call did not",
    }.items():
        with pytest.raises(ValueError, match=words):
            ExtraInputs(Velocity(wrong, Flow()), ("s",))(xt, t, s=s)


X, T = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no embedding": (
        lambda: ExtraInputs(Velocity(Lone(), Flow()), ("s",)),
        ValueError,
        "Lone does not say where it embeds its time.*set its attribute time_embedding to",
    ),
    "a string": (lambda: ExtraInputs(FLOW.build(), "s"), ValueError, "needs the names of inputs"),  # type: ignore[arg-type]
    "nothing": (lambda: ExtraInputs(FLOW.build(), ()), ValueError, "needs the names of inputs"),
    "no name": (
        lambda: ExtraInputs(FLOW.build(), ("a b",)),
        ValueError,
        "an input cannot be named 'a b'",
    ),
    "taken": (
        lambda: replace(FLOW, inputs=("cond",)).build(),
        ValueError,
        "an input cannot be named 'cond'",
    ),
    "of a module": (
        lambda: ExtraInputs(FLOW.build(), ("forward",)),
        ValueError,
        "an input cannot be named 'forward'",
    ),
    "twice": (
        lambda: ExtraInputs(ExtraInputs(FLOW.build(), ("w",)), ("s", "w")),
        ValueError,
        "there are two inputs named 'w'",
    ),
    "no label": (
        lambda: ExtraInputs(Model(MLP(8, 1), (2,), path=VE(0.0)).build(), ("s",)),
        ValueError,
        r"label\(t\) of VE\(t_min=0.0, t_max=80.0\) is not finite",
    ),
    "unknown": (
        lambda: ExtraInputs(FLOW.build(), ("s", "w"))(X, T, v=T),
        TypeError,
        "this denoiser has no input 'v'; it has s, w",
    ),
    "shape": (
        lambda: ExtraInputs(FLOW.build(), ("s",))(X, T, s=T[:2]),
        ValueError,
        r"s has shape \(2,\), expected \(3,\) or \(\) for x_t \(3, 1, 8, 8\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said(case: str) -> None:
    make, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        make()


def test_guidance_hands_inputs_to_both_branches() -> None:
    net: Any = stirred(ExtraInputs(FLOW.build(), ("s",)))
    xt, t, cond, s = samples(net)
    with torch.no_grad():
        on, off = net(xt, t, cond, s=s), net(xt, t, None, s=s)
        found = guided(net, xt, t, cond, [4.0, 1], named={"s": s}, tap=True)
        plain = guided(net, xt, t, cond, [4.0]).predictions[0]
    assert torch.equal(found.predictions[0], off + 4 * (on - off))
    assert torch.equal(found.predictions[1], on)
    assert found.features is not None
    assert torch.equal(found.features, net.encode(xt, t, cond, s=s))
    assert float((found.predictions[0] - plain).abs().max()) > 1e-4
    assert CFG(Heun(steps=2), 2.0)(net, xt, cond).shape == xt.shape


@each_net
def test_gradients_reach_the_inputs_and_their_weights(name: str) -> None:
    """At the start to the last layers; then to all, and to the second time itself."""
    net: Any = ExtraInputs(stirred(NETS[name]()), ("s",)).eval()
    xt, t, cond, s = samples(net, shape_of(name))
    net(xt, t, cond, s=s).square().mean().backward()
    last = net.embeddings.s.last
    assert last.weight.grad.abs().max() > 0
    stirred(net.embeddings)
    s = s.clone().requires_grad_()
    net(xt, t, cond, s=s).square().mean().backward()
    assert s.grad is not None
    assert bool((s.grad != 0).all())
    assert all(p.grad is not None for p in net.embeddings.parameters())


@pytest.mark.parametrize("name", ["mlp", "patches", "ddpm++", "adm", "edm2"])
def test_recomputation_has_the_same_gradients(name: str) -> None:
    found = []
    for lean in (False, True):
        net: Any = stirred(ExtraInputs(stirred(NETS[name]()), ("s",)))
        if lean:
            recompute(net)
        xt, t, cond, s = samples(net, shape_of(name))
        torch.manual_seed(3)
        out, features = net.forward_with_features(xt, t, cond, s=s)
        (out.square().mean() + features.square().mean()).backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 4
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_beside_adapters_inputs_are_trained_in_full(order: str) -> None:
    """Adapted before or after: the same parameters, and one merged network that answers alike."""
    lora = LoRA(2, targets=("*",))
    plain = stirred(FLOW.build())
    teacher: Any = ExtraInputs(plain, ("s",))
    role: Any = (
        ExtraInputs(lora.adapt(plain), ("s",)) if order == "inside" else lora.adapt(teacher)
    )
    full = {f"embeddings.s.{x}.{y}" for x in ("first", "last") for y in ("weight", "bias")}
    trained = {name for name, p in role.named_parameters() if p.requires_grad}
    assert trained > full
    assert all(name in full or name.endswith((".up", ".down.weight")) for name in trained)
    assert trained <= set(role.state_dict())
    assert len(lora.layers(teacher)) == len(lora.layers(plain))
    before = {key: t.clone() for key, t in teacher.state_dict().items()}
    stirred(role, seed=1)
    assert all(torch.equal(before[key], t) for key, t in teacher.state_dict().items())
    merged = replace(FLOW, inputs=("s",)).build()
    merged.load_state_dict(lora.merged(teacher.state_dict(), role.state_dict()))
    xt, t, cond, s = samples(teacher)
    with torch.no_grad():
        torch.testing.assert_close(merged(xt, t, cond, s=s), role(xt, t, cond, s=s))
        assert float((role(xt, t, cond, s=s) - teacher(xt, t, cond)).abs().max()) > 1e-3


def test_half_precision() -> None:
    """Embeddings stay in float32 beside a bfloat16 network; under autocast both answer alike."""
    net: Any = stirred(ExtraInputs(NETS["patches"](), ("s",))).eval()
    xt, t, cond, s = samples(net)
    full = net(xt, t, cond, s=s)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(xt, t, cond, s=s)
    assert float((half.float() - full).norm() / full.norm()) < 0.02
    held: Any = ExtraInputs(NETS["patches"]().bfloat16(), ("s",))
    assert {p.dtype for p in held.embeddings.parameters()} == {torch.float32}
    assert held(xt.bfloat16(), t, cond, s=s).isfinite().all()


def test_models_say_their_inputs_and_old_ones_have_none(tmp_path: Path) -> None:
    """The seed makes the same network inside; folders come back to the bit, old ones too."""
    model = replace(FLOW, inputs=("s", "w"))
    assert decode(json.loads(json.dumps(encode(model)))) == parse(repr(model)) == model
    old = encode(FLOW)
    del old["inputs"]
    assert decode(old) == FLOW
    inside, net = FLOW.build(3).state_dict(), model.build(3).state_dict()
    assert all(torch.equal(net[f"net.{key}"], t) for key, t in inside.items())
    assert not torch.equal(net["embeddings.s.first.weight"], net["embeddings.w.first.weight"])
    student = stirred(model.build())
    save_student(tmp_path / "student", student, model, SiD(), {})
    again = load_student(tmp_path / "student")
    assert again.model == model
    xt, t, cond, s = samples(student)
    with torch.no_grad():
        assert torch.equal(again.denoiser(xt, t, cond, s=s), student(xt, t, cond, s=s))


def test_folders_of_before_there_were_inputs_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(value: Any) -> Any:
        return {k: v for k, v in encode(value).items() if k != "inputs"}

    student = FLOW.build()
    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "encode", before)
        save_student(tmp_path / "old", student, FLOW, SiD(), {})
    assert '"inputs"' not in (tmp_path / "old" / "model.json").read_text()
    again = load_student(tmp_path / "old")
    assert again.model == FLOW
    xt, t, cond, _ = samples(student)
    assert torch.equal(again.denoiser(xt, t, cond), student(xt, t, cond))


class Jump(nn.Module):
    """A flow map's step, as a student is exported."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net

    def forward(self, xt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        out: Tensor = self.net.path.ddim(xt, self.net(xt, t, s=s), t, s)
        return out


@pytest.mark.parametrize("name", ["mlp", "edm2", "adapted"])
def test_a_jump_is_one_exported_graph(name: str) -> None:
    """Of any batch size, with s as an input."""
    jump = Jump(stirred(ExtraInputs(stirred(NETS[name]()), ("s",)))).eval()
    xt, t, _, s = samples(jump.net)
    free = ({0: torch.export.Dim.AUTO},) * 3
    with torch.no_grad():
        program = torch.export.export(jump, (xt, t, s), dynamic_shapes=free).module()
        xt, t, _, s = samples(jump.net, count=3)
        torch.testing.assert_close(program(xt, t, s), jump(xt, t, s))
        assert float((program(xt, t, s / 2) - jump(xt, t, s)).abs().max()) > 1e-3


def test_embeddings_are_no_blocks() -> None:
    """A network without blocks is still one whose activations cannot be computed again."""
    lone = ExtraInputs(Velocity(Says(), Flow()), ("s",))
    assert not has_blocks(lone)
    with pytest.raises(ValueError, match="ExtraInputs has no list of blocks"):
        recompute(lone)
