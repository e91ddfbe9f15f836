"""What a method's author or a recipe's can get wrong is refused in a sentence."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch

from fewstep import MLP, GaussianMixture, Latents, Model, SiD, train
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras, LogitNormal, LogNormal, TimeLaw, Uniform
from fewstep.diffusion.types import Sampler
from fewstep.distillation.method import Loss, Method, Turn
from tests.instances import METHODS


@dataclass(frozen=True)
class Odd(Method):
    """Its only turn updates `net` on `loss`."""

    sampler: Sampler = FewStep()
    net: str = "student"
    loss: Callable[..., Any] = lambda nets, teacher, batch: Loss(
        nets["student"].net.last.bias.sum()
    )
    bare: bool = False

    def turns(self, step: int) -> Sequence[Turn]:
        turn = Turn(self.net, self.loss)
        return turn if self.bare else (turn,)  # type: ignore[return-value]


def once(method: Method) -> float:
    """The loss of one step."""
    net = Model(MLP(8, 1), (2,)).build()
    return next(train(method, GaussianMixture.ring(), net, Latents((2,)), batch=4, steps=1)).logs[
        "student/loss"
    ]


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (Odd(net="fakes"), "Odd has a turn of 'fakes', but its nets are student, fake"),
        (Odd(bare=True), "Odd.turns must return Turns, got 'student'"),
        (
            Odd(loss=lambda *_: torch.zeros(())),
            "the loss of 'student' returned a Tensor; return Loss(total, logs)",
        ),
        (
            Odd(loss=lambda nets, *_: Loss(nets["student"].net.last.bias)),
            "the loss of 'student': total must be a scalar, got (2,)",
        ),
        (
            Odd(loss=lambda nets, *_: Loss(nets["student"].net.last.bias.sum(), {"a": 1.0})),
            "the loss of 'student': a must be a scalar, got float",
        ),
        (
            Odd(loss=lambda *_: Loss(torch.zeros(()))),
            "the loss of 'student' does not depend on its parameters: no gradient reaches them",
        ),
    ],
)
def test_an_ill_formed_method_is_told_what_to_mend(method: Method, sentence: str) -> None:
    assert once(Odd()) == 0.0  # the well-formed one: the last bias starts at zero
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared whole)
        once(method)
    assert str(caught.value) == sentence


def test_a_student_without_weights_is_told_to_be_a_network() -> None:
    """A closed form has a denoiser to start from, and nothing to learn with."""
    teacher = GaussianMixture.ring()
    missing = "a network is missing: the net 'fake' is a GaussianMixture, which has no weights"
    with pytest.raises(ValueError, match=missing + ".*--model.*`net` of `train`"):
        next(train(SiD(), teacher, teacher, Latents((2,)), batch=2, steps=1))


@pytest.mark.parametrize(
    ("law", "wrong", "what"),
    [
        (LogNormal, {"std": -1.0}, "std > 0"),
        (LogNormal, {"std": math.nan}, "std > 0"),
        (LogitNormal, {"std": 0.0}, "std > 0"),
        (Uniform, {"lo": 1.0, "hi": 0.5}, "hi - lo > 0"),
        (Karras, {"lo": 90.0}, "hi - lo > 0"),
        (Karras, {"lo": -1.0}, "lo >= 0"),
        (Karras, {"rho": 0.0}, "rho > 0"),
        (Karras, {"tmax": -800.0}, "tmax > 0"),
    ],
)
def test_an_impossible_law_is_refused(law: Any, wrong: dict[str, float], what: str) -> None:
    proper: TimeLaw = law()
    assert bool((proper.quantile(torch.tensor([0.1, 0.5, 0.9])).diff() > 0).all())
    with pytest.raises(ValueError, match=rf"^{law.__name__}\(.* needs {what}"):
        law(**wrong)


@pytest.mark.parametrize("method", {type(method): method for method in METHODS}.values(), ids=repr)
def test_what_no_literal_names_and_a_ratio_below_one_are_refused(method: Method) -> None:
    """By every method, though it has checks of its own: it asks `Method` for these first."""
    name, hints = type(method).__name__, typing.get_type_hints(type(method))
    wrong: dict[str, Any] = {}
    for field in fields(method):
        if typing.get_origin(hints[field.name]) is typing.Literal:
            with pytest.raises(ValueError, match=rf"^{name}\.{field.name} is .*, got 'other'$"):
                replace(method, **{field.name: "other"})
        if field.name == "ratio":
            wrong = {"ratio": 0}
            with pytest.raises(ValueError, match=re.escape(f"{name}.ratio is 1 or more, got 0")):
                replace(method, **wrong)
    assert bool(wrong) or method.ratio == 1
