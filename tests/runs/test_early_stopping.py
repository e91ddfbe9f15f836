"""Rules decide by what they saw and remember: the best look, spikes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fewstep.config import encode, parse
from fewstep.runs.early_stopping import Best, Memory, Spikes

LINE = {
    "step": 5,
    "images": 80,
    "diversity": 0.5,
    "levels": [{"t": 1.0}],
    "quick": {"samples": 9, "swd": 2},
}


def test_the_best_is_the_first_of_the_smallest() -> None:
    """Or of the largest; what is not finite counts as a look, once there is a best."""
    seen = [math.nan, 3.0, 1.0, 1.0, math.inf, 2.0]
    best, kept = Best("quick.swd", patience=3), list[list[float]]()
    memory: Memory = {}
    for step, value in enumerate(seen, 1):
        memory["best"] = best.judged({"quick": {"swd": value}}, memory.get("best", []), step)
        kept.append(memory["best"])
        assert best.over(memory) == (step == 6)
    assert kept == [[], [3, 2, 0], [1, 3, 0], [1, 3, 1], [1, 3, 2], [1, 3, 3]]
    assert Best("quick.swd", "max").judged(LINE, [1.0, 3.0, 2.0], 9) == [2.0, 9.0, 0.0]
    assert not Best("quick.swd").over(memory)


def test_what_is_good_is_known_by_its_name() -> None:
    """Large alignment and diversity, small distances; unless the run says otherwise."""
    before = [1.0, 3.0, 2.0]
    for metric, mode, better, worse in (
        ("quick.clip", "auto", 1.1, 0.9),
        ("diversity", "auto", 1.1, 0.9),
        ("quick.fd_digits", "auto", 0.9, 1.1),
        ("quick.clip", "min", 0.9, 1.1),
        ("quick.fd_digits", "max", 1.1, 0.9),
    ):
        best = Best(metric, mode)
        *folders, name = metric.split(".")
        for value, kept in ((better, [better, 9.0, 0.0]), (worse, [1.0, 3.0, 3.0])):
            line = {"quick": {name: value}} if folders else {name: value}
            assert best.judged(line, before, 9) == kept, (metric, mode, value)


def test_other_metrics_and_numbers_are_refused() -> None:
    sentence = "Run.best.metric is 'fid', but what this run looks at is diversity, quick.swd"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        Best("fid").judged(LINE, [], 1)
    for text, words in {
        "Best(patience=3)": "Best needs patience >= 0, and a metric to be patient with",
        "Best('diversity', patience=-1)": "Best needs patience >= 0",
        "Best(mode='most')": "Best.mode is 'auto' | 'min' | 'max', got 'most'",
        "Spikes(limit=0)": "Spikes need limit > 0, steps >= 1 and window >= 10",
        "Spikes(window=9)": "Spikes need limit > 0, steps >= 1 and window >= 10",
    }.items():
        with pytest.raises(ValueError, match=words.replace("|", r"\|")):
            parse(text)
    assert parse("Spikes(limit=inf)").found({"a/loss": 1.0}, {}) == []
    assert encode(Best()) == {"type": "Best", "metric": "", "mode": "auto", "patience": 0}


def series(seed: int) -> list[float]:
    """Normal noise of mean -3 and deviation 2, with single outliers; a jump by 40 at step 300."""
    noise = -3 + 2 * torch.randn(500, generator=torch.Generator().manual_seed(seed)).double()
    noise[[210, 250, 251]] += 100
    noise[300:] -= 40
    return noise.tolist()


def spikes(values: list[float], rule: Spikes, resumed: tuple[int, ...] = ()) -> list[int]:
    """The steps, from 1, at which a spike is found; memory goes through JSON at some."""
    memory: Memory = {}
    found = []
    for step, value in enumerate(values, 1):
        logs = {"student/loss": value, "student/lr": 1e9 * step, "fake/grad_norm": 1.0}
        names = rule.found(logs, memory)
        if names:
            assert names == ["student/loss"]
            found.append(step)
        if step in resumed:
            memory = json.loads(json.dumps(memory))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_spike_is_twenty_far_steps_in_a_row(seed: int) -> None:
    """40 are 20 deviations: found after 20 steps, once, since the new level is then usual; noise
    and outliers are not found, nor is the jump by a rule that asks for more."""
    values = series(seed)
    assert spikes(values, Spikes()) == [320]
    assert spikes(values, Spikes(), (1, 199, 211, 300, 310, 319, 320, 321)) == [320]
    assert spikes(values, Spikes(limit=30.0)) == []
    assert spikes(values[:318], Spikes()) == []
    assert spikes([*values[:310], math.nan, *values[310:]], Spikes()) == [321]
    assert spikes([*values[:310], -3.0, *values[310:]], Spikes()) == [331]


def test_a_loss_that_hardly_moves_does_not_spike() -> None:
    """A tenth of a percent of the median is near, whatever the spread."""
    for jump, found in ((0.05, []), (0.09, [220])):
        values = [10.0] * 200 + [10.0 + jump] * 30
        assert spikes(values, Spikes()) == found


def test_the_alarm_is_on_while_something_is_far() -> None:
    memory: Memory = {}
    rule = Spikes(window=10, steps=3)
    assert [
        bool(rule.found({"a/loss": value}, memory)) or rule.alarm(memory)
        for value in [1.0] * 10 + [9.0, 1.0, 9.0, 9.0, 9.0, 9.0]
    ] == [False] * 10 + [True, False, True, True, True, False]
