"""Whether the fake score keeps up: what is measured, and what follows from it.

Gaussians in one dimension on x_t = x + t eps: the score of N(m, s^2) is in reach of the fake
score, so that what it could gain is known.
"""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batches import Latents
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.method import Method, Nets
from fewstep.distillation.pace import BEHIND, LEVEL, MOST, WINDOW, Pace, fewest, shortfall
from fewstep.losses.weight import EDMWeight
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.sid import SiD
from fewstep.methods.tdm import TDM
from fewstep.storage import checkpoint
from fewstep.training.loop import State, train
from fewstep.training.optim import Optim
from tests.instances import METHODS

NOISE = Latents((1,))
AUTO = DiffInstruct(
    FewStep(2.5), Karras(0.01, 10.0), fake=FakeScore(Karras(0.01, 10.0), EDMWeight()), ratio="auto"
)


class Normal(nn.Module):
    """The denoiser of N(m, s^2): exact, as a teacher; as a student its samples are Gaussian."""

    path = VE()

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(std).log())

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        variance = (2 * self.log_std).exp()
        return self.mean + variance / (variance + t[:, None] ** 2) * (xt - self.mean)


TEACHER, STUDENT = Normal(1.0, 0.5), Normal(0.0, 1.0)


def excess(fake: Any, mean: float, std: float) -> float:
    """The share of the fake score's loss that is too much, of samples N(mean, std^2).

    Both are means over 400 quantiles of t, with the weight of `AUTO`.
    """
    t = AUTO.fake.times.quantile((torch.arange(400) + 0.5) / 400)
    w = (0.25 + t**2) / (0.25 * t**2)
    least = std**2 * t**2 / (std**2 + t**2)
    variance = (2 * fake.log_std.detach()).exp()
    slope, best = variance / (variance + t**2), std**2 / (std**2 + t**2)
    shift = (1 - slope) * (fake.mean.detach() - mean)
    more = (slope - best) ** 2 * (std**2 + t**2) + shift**2
    return float((w * more).mean() / (w * (least + more)).mean())


OPTIM = Optim(0.01, (0.0, 0.9))


def rates(slow: float) -> dict[str, Optim]:
    return {"student": OPTIM, "fake": replace(OPTIM, lr=3 * slow * OPTIM.lr)}


def run(
    steps: int,
    slow: float = 1.0,
    method: Method = AUTO,
    state: State | None = None,
    parts: int = 1,
) -> tuple[list[int], State]:
    """The updates at each step and the final state; the fake score's rate is `slow` of its own."""
    settings: Any = {"batch": 128, "steps": steps, "optim": rates(slow), "accumulate": parts}
    counts = []
    for record in train(method, TEACHER, STUDENT, NOISE, state=state, **settings):
        counts.append(int(record.logs.get("fake/updates", 1)))
    return counts, record.state


def lag(state: State) -> float:
    """The share of the fake score's loss that is too much."""
    student: Any
    fake, student = (state.nets[name] for name in ("fake", "student"))
    low, high = student(torch.tensor([[0.0], [2.5]]), torch.tensor([2.5])).flatten().tolist()
    return excess(fake, low, high - low)


def test_what_is_avoidable_is_the_excess_on_the_line_through_the_teacher() -> None:
    """In closed form, by two points for each normal number: moments up to the second are exact."""
    std, t = 0.7, 0.9
    x, eps = torch.tensor([*product((-1.0, 1.0), repeat=2)], dtype=torch.float64).T.reshape(
        2, 4, 1
    )
    x = std * x
    xt, w = x + t * eps, torch.tensor(3.0, dtype=torch.float64)
    best, teacher = std**2 / (std**2 + t**2), 0.8
    least = 3 * std**2 * t**2 / (std**2 + t**2)
    for slope in (best, teacher + 2 * (best - teacher), 0.5 * (best + teacher), 0.1):
        over, gap, loss = (shortfall(slope * xt, teacher * xt, x, w) / 4).tolist()
        assert loss == pytest.approx(least + 3 * (slope - best) ** 2 * (std**2 + t**2), rel=1e-6)
        assert over**2 / gap == pytest.approx(loss - least, abs=1e-7)  # a line through the best
        assert gap == pytest.approx(3 * (slope - teacher) ** 2 * (std**2 + t**2), rel=1e-6)
    off = best * xt + 0.2  # its error is orthogonal to the slope's: a lower bound is all it is
    over, gap, loss = (shortfall(off, teacher * xt, x, w) / 4).tolist()
    assert 0 < over**2 / gap < loss - least


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="target has shape"):
        shortfall(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(1))


def fed(share: float, times: int, pace: Pace | None = None) -> Pace:
    """A pace that was told of so many steps with this avoidable share."""
    pace = pace or Pace()
    for _ in range(times):
        pace.follow(torch.tensor([share**0.5, 1.0, 1.0]))
    return pace


def test_it_changes_by_one_after_each_window_and_within_bounds() -> None:
    assert [int(fed(2 * BEHIND, n).updates) for n in (WINDOW - 1, WINDOW, 2 * WINDOW)] == [1, 2, 3]
    most = fed(2 * BEHIND, 9 * WINDOW)
    assert int(most.updates) == MOST
    assert float(most.avoidable) == pytest.approx(2 * BEHIND)
    assert int(fed((BEHIND + LEVEL) / 2, 3 * WINDOW, most).updates) == MOST
    assert int(fed(LEVEL / 2, WINDOW, most).updates) == MOST - 1
    assert int(fed(LEVEL / 2, 9 * WINDOW, most).updates) == 1
    assert [most.reaches(n) for n in (1, 2)] == [True, False]
    assert Pace().to("meta").reaches(MOST)


def test_a_window_is_of_sums_and_begins_anew() -> None:
    """One step of many samples outweighs nine of few; 0 / 0 changes nothing, and is no number."""
    pace = fed(0.0, WINDOW - 1)
    pace.follow(100 * torch.tensor([1.0, 1.0, 1.0]))
    assert float(pace.avoidable) == pytest.approx(100**2 / (100 + WINDOW - 1) ** 2)
    assert pace.sums.tolist() == [0.0] * 3
    assert int(pace.steps) == 0
    before = int(pace.updates)
    for _ in range(WINDOW):
        pace.follow(torch.tensor([0.0, 0.0, 1.0]))
    assert (int(pace.updates), float(pace.avoidable)) == (before, 0.0)


def test_a_slow_fake_score_gets_more_updates_until_it_keeps_up() -> None:
    """At a thirtieth of the rate up to five; one again after the rate is what it was."""
    slow, state = run(5 * WINDOW, slow=1 / 30)
    assert [slow[n] for n in (0, WINDOW, 2 * WINDOW, 3 * WINDOW, 4 * WINDOW)] == [1, 2, 3, 4, 5]
    assert lag(state) > 20 * BEHIND
    after, state = run(11 * WINDOW, state=state)
    assert after[-1] == 1
    assert lag(state) < 2 * BEHIND


def test_a_fake_score_of_its_own_rate_is_soon_at_one_again() -> None:
    """It starts as the teacher, far from the student; the control has one update throughout."""
    counts, state = run(3 * WINDOW + 1)
    alone, control = run(3 * WINDOW + 1, method=replace(AUTO, ratio=1))
    assert (max(counts), counts[-1]) == (3, 2)
    assert set(alone) == {1}
    assert "pace" not in control.nets
    assert lag(state) < 2 * BEHIND < 10 * BEHIND < lag(control)


def test_it_resumes_in_the_middle_of_a_window_to_the_bit(tmp_path: Path) -> None:
    whole, end = run(3 * WINDOW, 1 / 30)
    parts, state = run(WINDOW + 4, 1 / 30)
    checkpoint.save(tmp_path, state, AUTO)
    again = State.init(AUTO, TEACHER, STUDENT)
    checkpoint.resume_newest(tmp_path, again, AUTO, rates(1 / 30))
    rest, last = run(3 * WINDOW, 1 / 30, state=again)
    assert parts + rest == whole
    assert whole[-1] > 1
    assert last.drawn == end.drawn == 128 * (sum(whole) + len(whole))
    for name, value in end.nets.state_dict().items():
        assert torch.equal(value, last.nets.state_dict()[name])


def test_parts_of_a_batch_change_nothing() -> None:
    """Sums are over the whole batch: the same updates, and the same sums but for rounding."""
    whole, a = run(WINDOW + 1, 1 / 30)
    parts, b = run(WINDOW + 1, 1 / 30, parts=2)
    assert whole == parts
    torch.testing.assert_close(a.nets["pace"].sums, b.nets["pace"].sums, rtol=1e-3, atol=1e-5)


def test_the_turns_and_what_they_measure() -> None:
    """`MOST` updates, of which the last are taken; the very last measures, and no other."""
    nets, batch = AUTO.init(TEACHER, STUDENT), NOISE(Draws.range(0, 8, 0))
    pace: Any = nets["pace"]
    turns = AUTO.turns(0)
    assert [turn.net for turn in turns] == ["fake"] * MOST + ["student"]
    for count in range(1, MOST + 1):
        pace.updates.fill_(count)
        taken = [turn for turn in turns if turn.when is None or turn.when(nets)]
        assert taken == list(turns[-count - 1 :])
        measured = [set(turn.loss(nets, TEACHER, batch).sums) for turn in taken]
        assert measured == [set()] * (count - 1) + [{"pace"}, set()]
    fixed = replace(AUTO, ratio=2)
    assert [turn.net for turn in fixed.turns(0)] == ["fake", "fake", "student"]
    assert all(turn.when is None for turn in fixed.turns(0))


def test_the_loss_is_that_of_a_fixed_ratio() -> None:
    """To the bit: what is measured has no part in it."""
    nets, batch = AUTO.init(TEACHER, STUDENT), NOISE(Draws.range(0, 8, 0))
    totals = []
    for method in (AUTO, replace(AUTO, ratio=1)):
        found = method.turns(0)[-2].loss(nets, TEACHER, batch).total
        assert found is not None
        totals.append(float(found))
    assert totals[0] == totals[1]


def test_it_measures_what_is_learnt_where_it_is_learnt() -> None:
    """The sums against the loss's own samples: f_psi = x_t + d gives over, gap and loss again."""
    nets, batch = AUTO.init(TEACHER, STUDENT), NOISE(Draws.range(0, 64, 0))
    nets["fake"] = Normal(0.3, 0.8)
    loss = AUTO.turns(0)[-2].loss(nets, TEACHER, batch)
    over, gap, own = (loss.sums["pace"] / 64).tolist()
    assert loss.total is not None
    assert own == pytest.approx(loss.total.item(), rel=1e-6)
    nets["fake"] = TEACHER
    teacher = AUTO.turns(0)[-2].loss(nets, TEACHER, batch)
    assert teacher.total is not None
    assert own - 2 * over + gap == pytest.approx(float(teacher.total), rel=1e-5)
    assert teacher.sums["pace"][:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("target", ["sample", "subinterval"])
def test_states_between_calls_measure_their_own_loss(target: Any) -> None:
    """The three give the loss that the teacher would have there, with TDM's and the phases'."""
    batch = NOISE(Draws.range(0, 64, 0))
    sampler = FewStep(2.5, 2, "ddim")
    for method in (TDM(sampler, target=target, ratio="auto"), PhasedDMD(sampler, ratio="auto")):
        nets = Nets({"student": STUDENT, "fake": Normal(0.3, 0.8), "pace": Pace()})
        turn = method.turns(0)[-2]
        loss = turn.loss(nets, TEACHER, batch)
        over, gap, own = (loss.sums["pace"] / 64).tolist()
        nets["fake"] = TEACHER
        teacher = turn.loss(nets, TEACHER, batch)
        assert loss.total is not None
        assert teacher.total is not None
        assert own == pytest.approx(loss.total.item(), rel=1e-5)
        assert own - 2 * over + gap == pytest.approx(float(teacher.total), rel=1e-5)


def test_other_texts_are_refused() -> None:
    assert [fewest(3), fewest("auto")] == [3, 1]
    with pytest.raises(ValueError, match="ratio is a whole number, or 'auto'; got 'often'"):
        replace(AUTO, ratio="often")
    with pytest.raises(ValueError, match=r"DiffInstruct.ratio is 1 or more, got 0"):
        replace(AUTO, ratio=0)
    with pytest.raises(ValueError, match=r"SiD.ratio is 1 where samples are shared, got auto"):
        SiD(shared=True, ratio="auto")


def test_every_method_with_a_ratio_has_it() -> None:
    """Its turns are as many as at five updates, and begin and end as at one."""
    found = {type(m): m for m in METHODS if "ratio" in {f.name for f in fields(m)}}
    assert len(found) >= 18
    for method in found.values():
        for step in (0, 10**6):
            auto, five, one = (
                replace(method, ratio=ratio).turns(step)  # type: ignore[call-arg]
                for ratio in ("auto", MOST, 1)
            )
            assert [turn.net for turn in auto] == [turn.net for turn in five]
            always = [turn.net for turn in auto if turn.when is None]
            assert always == [turn.net for turn in one]
