"""One whole iteration of official code, as recorded, and how far ours is from it.

A recording holds the weights, every random number, the losses, the gradients and the weights
afterwards: step_sid.safetensors, step_sida.safetensors and their _cond variants, of a network of
four channels on pictures of 8x8 (see `tests.recorded_networks`).

Reductions: the official loss is a sum over pixels, divided by the batch size, times a scale s (1
for the fake score, 100 for the student); ours is a mean over pixels and batch. With n pixels a
sample, official = s n ours, and gradients alike. Adam is blind to the factor but for its eps, so
ours runs with eps / (s n). The gradient is read as each optimiser begins its update.

Weights are compared where the recorded gradient exceeds 1e-5 of the largest of its tensor: 999 of
1000. Below, its sign may be rounding noise, and Adam's first step is lr times the sign.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch
from fewstep.distillation import discriminator
from fewstep.distillation.method import Loss, Method, Turn
from fewstep.losses.adversarial import averaged
from fewstep.losses.score import denoising, sid
from fewstep.methods.sid import SiD
from fewstep.nets.precond import Preconditioned
from fewstep.teachers import edm
from fewstep.training.ema import EMA
from fewstep.training.loop import State, train
from fewstep.training.optim import Optim
from tests.recorded_networks import GOLDEN

Group = Mapping[str, Tensor]
MARKS = {"x_g": 1e-5, "elem": 1e-5, "judged": 1e-5, "total": 1e-5}
MARKS |= {"grads": 1e-4, "after": 1e-6, "ema": 1e-6, "ema move": 0.01}
MARKS |= {"gen/elem": 3e-5}  # the recording is rounded by as much, as test_sid_step shows
HALVES = {"fake": "psi", "student": "gen"}
JUDGED = {"fake": "lossD_elem", "student": "gan_elem"}


class Recording:
    """One file; its tensors are grouped by what precedes the slash in their names."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.config = json.loads(file.metadata()["config"])
            self.kwargs = json.loads(file.metadata()["net_kwargs"])
        self.size = self.config["batch"]
        self.pixels = self["draws"]["z_psi"][0].numel()

    @classmethod
    def named(cls, name: str) -> Recording:
        """The recording of that name."""
        return cls(GOLDEN / f"{name}.safetensors")

    def __getitem__(self, group: str) -> dict[str, Tensor]:
        start = f"{group}/"
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    def net(self, group: str, **options: Any) -> Preconditioned:
        return edm.build(self.kwargs | options, self[group])

    def batch(self, net: str, rows: Tensor) -> Batch:
        """What the official code drew for these samples in the half that trains `net`.

        A recorded unit normal n, of a log-normal time, becomes the uniform number ndtr(n).
        """
        draws = {key: value[rows] for key, value in self["draws"].items()}
        if net == "fake":
            u = torch.special.ndtr(draws["psi_rnd_normal"].double())
            z, eps = draws["z_psi"], draws["psi_n"]
        else:
            z, eps, u = draws["z_g"], draws["g_n"], draws["g_rnd_t"].double()
        cond = draws["labels"] if self.kwargs["label_dim"] else None
        recorded: Any = Replay({"eps": eps, "t": u.flatten()})
        return Batch(z, cond, draws["real_images"], recorded)


@dataclass(frozen=True)
class Replay:
    """Stands in for `Draws`: recorded numbers in place of new ones."""

    values: Mapping[str, Tensor]

    def normal(self, purpose: str, shape: Sequence[int], dtype: Any = torch.float32) -> Tensor:
        assert self.values[purpose].shape[1:] == tuple(shape)
        return self.values[purpose].to(dtype)

    def uniform(self, purpose: str) -> Tensor:
        return self.values[purpose]


class Unaugmented:
    """A denoiser that is told, by zeros, that its input is not augmented."""

    def __init__(self, net: Any, after: Callable[[Tensor], Tensor] = torch.clone) -> None:
        self.net, self.path, self.after = net, net.path, after

    def zeros(self, xt: Tensor) -> Tensor:
        return xt.new_zeros(len(xt), self.net.model.map_augment.weight.shape[1])

    def __call__(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.after(self.net(xt, t, cond, self.zeros(xt)))

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        features: Tensor = self.net.encode(xt, t, cond, self.zeros(xt))
        return features

    def forward_with_features(
        self, xt: Tensor, t: Tensor, cond: Any = None
    ) -> tuple[Tensor, Tensor]:
        told, features = self.net.forward_with_features(xt, t, cond, self.zeros(xt))
        return self.after(told), features


@dataclass(frozen=True)
class Replayed(Method):
    """`inner`, with augment labels of zeros in the halves `told`, and of None in the others.

    The last three fields are for controls: the turns and their order, what is done to a net's
    predictions in the student's turn, and nets that are wrongly in training mode.
    """

    needs_data: ClassVar[bool] = True  # recordings have it, whoever reads it

    inner: Method = SiD()
    told: tuple[str, ...] = ("student",)
    order: tuple[str, ...] = ("fake", "student")
    after: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    training: tuple[str, ...] = ()

    def turns(self, step: int) -> Sequence[Turn]:
        turns = {turn.net: turn.loss for turn in self.inner.turns(step)}
        turns |= {net: partial(self.unaugmented, net, turns[net]) for net in self.told}
        return [Turn(net, turns[net]) for net in self.order]

    def unaugmented(self, net: str, loss: Any, nets: Any, teacher: Any, batch: Batch) -> Loss:
        after = self.after if net == "student" else {}
        told: Any = {}
        for name, each in {"teacher": teacher, **nets}.items():
            told[name] = Unaugmented(each, after.get(name, torch.clone))
            if name in self.training:
                each.train()
        return loss(told, told["teacher"], batch)


class Spy:
    """Calls a loss, and once more with every pixel as a sample: the loss pixel by pixel."""

    def __init__(self, loss: Callable[..., Tensor], x: int) -> None:
        self.loss, self.x, self.xs, self.each = loss, x, [], []

    def __call__(self, *args: Any) -> Tensor:
        x = args[self.x].detach()
        pixels = [a.expand_as(x).reshape(-1, 1) if isinstance(a, Tensor) else a for a in args]
        self.xs.append(x)
        self.each.append(self.loss(*pixels).detach().reshape(x.shape))
        return self.loss(*args)


class Judge:
    """Calls `averaged` and remembers: each sample's adversarial loss, by the net in turn."""

    def __init__(self) -> None:
        self.each: dict[str, list[Tensor]] = {"fake": [], "student": []}
        self.turn = ""

    def __call__(self, *args: Any) -> Tensor:
        self.each[self.turn].append(averaged(*args).detach())
        return averaged(*args)


def errors(
    gold: Recording,
    replayed: Replayed,
    accumulate: int = 1,
    images: int = 10**8,
    dropout: Collection[str] = (),
) -> dict[str, float]:
    """How far one step of `train` is from the recording.

    The recorded average is past its ramp, hence so many `images`. Nets named in `dropout` have
    dropout layers. Without its own turn the fake score starts as recorded after its update.
    """
    odds = {name: 0.13 * (name in dropout) for name in ("teacher", "fake", "student")}
    teacher = gold.net("teacher", dropout=odds["teacher"])
    state = State.init(replayed, teacher, gold.net("student", dropout=odds["student"]))
    fake = gold.net("fake" if "fake" in replayed.order else "fake_after", dropout=odds["fake"])
    state.nets["fake"], state.images = fake, images

    def source(draws: Draws) -> Batch:
        judge.turn = net = replayed.order[int(draws.index[0]) // gold.size]
        return gold.batch(net, draws.index % gold.size)

    rates = {"fake": gold.config["lr"], "student": gold.config["glr"]}
    scales = {"fake": gold.config["ls"], "student": gold.config["lsg"]}
    factors = {net: gold.pixels * scale for net, scale in scales.items()}
    how: Any = {"batch": gold.size, "steps": 1, "accumulate": accumulate}
    how["optim"] = {net: Optim(rates[net], eps=1e-8 / factors[net]) for net in rates}
    how["ema"] = EMA(halflife=gold.config["ema_halflife_kimg"] * 1000)
    spies = {"fake": Spy(denoising, 1), "student": Spy(sid, 0)}
    judge = Judge()
    inner: Any = replayed.inner
    had: dict[Tensor, Tensor] = {}

    def seen(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = optimizer.param_groups[0]["params"]
        had.update((p, p.grad.clone()) for p in parameters if p.grad is not None)

    with pytest.MonkeyPatch.context() as patch, ExitStack() as after:
        after.callback(register_optimizer_step_pre_hook(seen).remove)
        for net, owner in {"fake": inner.fake, "student": inner}.items():
            module = sys.modules[type(owner).__module__]
            patch.setattr(module, spies[net].loss.__name__, spies[net])
        patch.setattr(discriminator, "averaged", judge)
        (record,) = train(replayed, teacher, nn.Identity(), source, state=state, **how)
    found = {}
    for net in replayed.order:
        half, factor, grads = gold[HALVES[net]], factors[net], gold[f"grads_{net}"]
        spy = spies[net]
        named = {n: had[p] for n, p in state.nets[net].named_parameters() if p in had}
        size = half["loss_elem"].abs().sum() * scales[net] / gold.size
        found[net] = {
            "x_g": relative(torch.cat(spy.xs), half["x_g"]),
            "elem": relative(torch.cat(spy.each), half["loss_elem"]),
            "total": float(abs(factor * record.logs[f"{net}/loss"] - half["total"]) / size),
            "grads": gradients({n: factor * grad for n, grad in named.items()}, grads),
            "after": weights(state.nets[net], gold[f"{net}_after"], grads),
        }
        if JUDGED[net] in half:  # gan_elem is multiplied by the number of pixels
            each = torch.cat(judge.each[net]) * (gold.pixels if net == "student" else 1)
            found[net]["judged"] = relative(each, half[JUDGED[net]].flatten())
    if "student" in found:
        masked = gold["ema_after"], gold["grads_student"]
        off, move = (weights(net, *masked) for net in (state.average, gold.net("student")))
        found["student"] |= {"ema": off, "ema move": off / move}
    return {f"{HALVES[net]}/{key}": value for net in found for key, value in found[net].items()}


def in_double(gold: Recording, replayed: Replayed) -> float:
    """How far the student's loss in float64, pixel by pixel, is from the recording."""
    teacher = gold.net("teacher").double()
    nets: Any = {"student": gold.net("student").double(), "fake": gold.net("fake_after").double()}
    batch = gold.batch("student", torch.arange(gold.size))
    spy, turns = Spy(sid, 0), {turn.net: turn.loss for turn in replayed.turns(0)}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(sys.modules[type(replayed.inner).__module__], "sid", spy)
        turns["student"](nets, teacher, batch._replace(z=batch.z.double()))
    return relative(spy.each[0], gold["gen"]["loss_elem"])


def relative(mine: Tensor, recorded: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((mine - recorded).abs().max() / recorded.abs().max())


def gradients(mine: Group, recorded: Group) -> float:
    """The largest relative difference, in norm, of a tensor; where one is zero both are."""
    assert set(mine) == set(recorded)
    ratio = {n: (mine[n] - g).norm() / g.norm().clamp_min(1e-30) for n, g in recorded.items()}
    return float(max(ratio.values()))


def weights(net: nn.Module, recorded: Group, grads: Group) -> float:
    """The largest difference of a weight whose gradient is no rounding noise."""
    state, worst, counted, total = net.state_dict(), [], 0, 0
    for name, value in recorded.items():
        size = grads.get(name, torch.ones_like(value)).abs()
        large = size >= 1e-5 * size.max()
        counted, total = counted + int(large.sum()), total + large.numel()
        worst.append(float((state[name] - value).abs()[large].max()))
    assert counted > 0.998 * total
    return max(worst)


def missed(found: Mapping[str, float]) -> set[str]:
    """What is farther off than its mark."""
    marks = {key: MARKS.get(key) or MARKS[key.split("/")[1]] for key in found}
    return {key for key, value in found.items() if not value < marks[key]}
