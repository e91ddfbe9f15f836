"""Walks between samples, and variations of one: ends, laws, and what each limit is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.around import (
    Turned,
    default_label,
    start,
    start_of_variations,
    start_of_walk,
    variations,
    walk,
)
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.pixels import NotFinite
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Ancestral, FewStep, Heun, MultiStep
from fewstep.diffusion.time_distributions import Karras, NoiseLevels
from fewstep.diffusion.types import Cond, Sampler
from fewstep.teachers.gaussian import Gaussian

MEAN = torch.tensor([0.4, -0.7])


def generator(sampler: Sampler = Heun(Karras(), 18), path: NoisePath = VE()) -> Generator:
    return Generator(Gaussian(MEAN, 0.3, path), sampler, (2,))


class Labelled(torch.nn.Module):
    """x_0 is the label, or the mean of the prompt, whatever the noise; and no label at 9."""

    path = VE()

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        told = cond["words"].mean(1) if isinstance(cond, dict) else cond
        return told[:, None].float().expand_as(xt)


LABELLED = Generator(Labelled(), FewStep(2.5), (2,), classes=9)


def spoken(prompts: Sequence[str]) -> Cond:
    return {"words": torch.tensor([[float(len(p)), 0.0] for p in prompts])}


def numbers(count: int) -> tuple[Tensor, Tensor]:
    return torch.arange(count), torch.arange(count) + count


@pytest.mark.parametrize("sampler", [Heun(Karras(), 5), FewStep(2.5, 3), Ancestral(2.5, 3)])
def test_a_walk_ends_at_both_samples(sampler: Sampler) -> None:
    """To the bit: with all noise that was drawn on the way, not z alone."""
    made = generator(sampler)
    found = walk(made, 3, 8, 5)
    ends = start(made, [3, 3, 3, 8, 8]).samples(made)
    assert torch.equal(found[0], ends[0])
    assert torch.equal(found[-1], ends[-1])
    assert (found.diff(dim=0).norm(dim=1) > 1e-3).all()


def test_the_middle_of_a_walk_is_as_likely_as_its_ends() -> None:
    """z is standard normal all along, by its second moments; a straight line's would be 1/2."""
    a, b = numbers(20_000)
    for share in (0.0, 0.3, 0.5, 1.0):
        shares = torch.full((20_000,), share, dtype=torch.float64)
        z = Turned(a, 0, "sample/", other=b, share=shares).normal("z", (2,))
        assert torch.allclose(z.T.cov(), torch.eye(2), atol=0.03)
        near = Draws(a, 0, "sample/").normal("z", (2,))
        together = float((z * near).mean())
        assert together == pytest.approx(math.cos(math.pi / 2 * share), abs=0.02)
    begun = start_of_walk(generator(), 3, 8, 3)
    first, second = (Draws(torch.tensor([n]), 0, "sample/").normal("z", (2,)) for n in (3, 8))
    assert torch.allclose(begun.z[1:2], (first + second) / math.sqrt(2), atol=1e-6)


def test_draws_that_are_turned_keep_their_other_numbers() -> None:
    a, b = numbers(4)
    turned = Turned(a, 0, "p/", other=b, share=torch.ones(4, dtype=torch.float64))
    plain = Draws(a, 0, "p/")
    assert torch.equal(turned.uniform("u"), plain.uniform("u"))
    below = turned.under("q").normal("z", (3,))
    assert torch.equal(below, Draws(b, 0, "p/").under("q").normal("z", (3,)))
    with pytest.raises(ValueError, match="from one seed to another; both are the same"):
        replace(turned, other=a).normal("z", (3,))


@pytest.mark.parametrize(
    ("sampler", "path"),
    [
        (Heun(Karras(), 40), VE()),
        (MultiStep(Karras(), 40, "dpm++"), VE()),
        (Heun(NoiseLevels(Flow(), 0.002, 80.0), 40), Flow()),
        (FewStep(999.0, 250, "ddim", unit=True), VP()),
        (FewStep(1.0, 200, "ddim"), Flow()),
        (FewStep(math.pi / 2, 200, "ddim"), TrigFlow()),
    ],
    ids=repr,
)
def test_variations_of_a_gaussian(sampler: Sampler, path: NoisePath) -> None:
    """From x_t = alpha x_0 + sigma eps the flow of N(m, v) leads to m + g (x_t - alpha m).

    g^2 = v / (alpha^2 v + sigma^2), as the flow keeps the quantiles of a normal law. At the share
    1/2, alpha = sigma, so that x' = m + k (x_0 - m + eps) with k^2 = v / (v + 1).
    """
    made = generator(sampler, path)
    of = start(made, [5]).x0(made)
    found = variations(made, 5, range(40), 0.5)
    eps = Draws(torch.arange(40), 0, "sample/").normal("z", (2,))
    expected = MEAN + math.sqrt(0.3 / 1.3) * (of - MEAN + eps)
    assert torch.allclose(found, expected, atol=0.03)
    assert (found - of).abs().max() > 0.5


def test_limits_of_the_share() -> None:
    """No noise leaves the sample, and all of it the samples of the seeds that it is drawn by."""
    made = generator(Heun(NoiseLevels(Flow(), 0.001, 80.0), 40, 1), Flow(1e-6))
    of = start(made, [5]).x0(made)
    assert torch.allclose(variations(made, 5, range(4), 1e-5), of.expand(4, 2), atol=1e-3)
    whole = variations(made, 5, range(4), 1 - 1e-7)
    others = start(made, range(4)).samples(made)
    assert torch.allclose(whole, others, atol=0.02)
    assert (others - of).abs().max() > 0.3


def test_teachers_vary_what_their_students_make() -> None:
    """`source` makes the sample, the generator its variations, of the sample's own label."""
    source = replace(generator(), denoiser=Gaussian(MEAN + 5, 0.3))
    by_source = variations(generator(), 5, range(40), 0.1, source=source)
    assert float(by_source.mean()) > 3  # near the source's samples, where it starts
    assert default_label(LABELLED, 5, None) == 5
    assert default_label(LABELLED, 14, None) == 5
    assert default_label(LABELLED, 14, 2) == 2
    assert default_label(generator(), 14, None) is None
    found = variations(LABELLED, 14, [0, 1], 0.5)
    assert found.tolist() == [[5.0, 5.0]] * 2


def test_conditions_are_those_that_were_asked_for() -> None:
    """One label or prompt for all; by default the label of the first seed."""
    assert walk(LABELLED, 3, 8, 3).tolist() == [[3.0, 3.0]] * 3
    assert walk(LABELLED, 3, 8, 3, label=9).tolist() == [[9.0, 9.0]] * 3
    assert start(LABELLED, [3, 4]).samples(LABELLED).tolist() == [[3.0, 3.0], [4.0, 4.0]]
    of_text = replace(LABELLED, classes=0, text=spoken)
    assert walk(of_text, 3, 8, 3, prompt="four").tolist() == [[2.0, 2.0]] * 3
    assert variations(of_text, 3, [1], 0.5, prompt="sixsix").tolist() == [[3.0, 3.0]]


def test_they_are_samples_as_generators_make_them() -> None:
    """To the bit, decoded; and refused where they hold no numbers."""
    made = replace(generator(FewStep(2.5, 3)), decode=lambda x: 2 * x)
    found = start(made, [4, 7]).samples(made)
    assert torch.equal(found, made.sample([4, 7]))
    assert torch.equal(found, 2 * start(made, [4, 7]).x0(made))
    broken = replace(made, decode=lambda x: x / 0)
    with pytest.raises(NotFinite):
        walk(broken, 3, 8, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: walk(generator(), 3, 3, 4), "from one seed to another, in 2 pictures or more"),
        (lambda: walk(generator(), 3, 4, 1), "in 2 pictures or more; got seeds 3 and 4, and 1"),
        (lambda: walk(generator(), 3, 4, 2, prompt="a"), "this model takes no prompt"),
        (lambda: walk(generator(), 3, 4, 2, label=1), "this model takes no labels"),
        (lambda: variations(generator(), 3, [4], 1.0), "between 0 and 1, got 1"),
        (lambda: variations(generator(), 3, [4], 0.0), "between 0 and 1, got 0"),
        (
            lambda: start_of_variations(generator(), torch.zeros(1, 3), [4], 0.5),
            r"a sample of shape \(3,\) cannot be varied by a model of samples of shape \(2,\)",
        ),
    ],
    ids=range(7),
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
