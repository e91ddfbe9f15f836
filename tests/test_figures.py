"""Figures in the pages are fields of committed results, and comparisons are paired by seed."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewstep.storage.files import read_json, write_json

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("benchmarks are not part of this distribution", allow_module_level=True)
pytest.importorskip("scipy")
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "claims")]
lab, pages, summary = map(import_module, ("lab", "pages", "summary"))


@pytest.fixture(scope="module")
def fields() -> dict[str, pages.Field]:
    return pages.sources()


def text(name: str) -> str:
    place = (pages.PAGES | pages.PASSAGES)[name]
    return (pages.ROOT / place).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*pages.PAGES, *pages.PASSAGES])
def test_every_figure_is_a_field_of_the_results(name: str, fields: dict[str, pages.Field]) -> None:
    assert pages.problems(name, text(name), fields) == []


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_changed_figure_is_noticed(name: str, fields: dict[str, pages.Field]) -> None:
    """Any one figure, a digit off (of twenty or so); a figure added; and a line taken away."""
    page = text(name)
    places = [m for m in pages.FIGURE.finditer(page) if "](" not in page[m.start() - 40 : m.end()]]
    assert len(places) > 6
    for found in places[:: 1 + len(places) // 20]:
        last = found.end() - 1 if page[found.end() - 1].isdigit() else found.start()
        wrong = page[:last] + str((int(page[last]) + 1) % 10) + page[last + 1 :]
        assert pages.problems(name, wrong, fields)
    assert pages.problems(name, page + "\nIt is 1.13 times as far.\n", fields)
    assert pages.problems(name, page.split("\n", 1)[1], fields)


@pytest.mark.parametrize("name", pages.PASSAGES)
def test_a_changed_passage_is_noticed(name: str, fields: dict[str, pages.Field]) -> None:
    """Each of its figures, a digit off; other line breaks change nothing."""
    page = " ".join(text(name).split())
    passage = (pages.TEMPLATES / name).read_text(encoding="utf-8").format(**fields)
    passage = " ".join(passage.split())
    assert pages.problems(name, page, fields) == []
    figures = list(pages.FIGURE.finditer(passage))
    assert figures
    for found in figures:
        last = max(i for i in range(*found.span()) if passage[i].isdigit())
        wrong = passage[:last] + str((int(passage[last]) + 1) % 10) + passage[last + 1 :]
        assert pages.problems(name, page.replace(passage, wrong), fields)


@pytest.mark.parametrize("figure", ["1.13", ".35", "3 %", "12%", "1,433", "0.5e-3"])
def test_figures_typed_into_a_template_are_refused(figure: str) -> None:
    """Whatever their form, but not in code, links and fields, nor if they are stated."""
    assert pages.unbacked(f"as far as {figure}, in the mean", frozenset()) == [figure]
    assert pages.unbacked(f"as far as {figure}, in the mean", frozenset([figure])) == []
    assert pages.unbacked(f"`a {figure}` [b](c/{figure}.md) {{d[{figure}]}}", frozenset()) == []


def test_the_summary_is_that_of_the_trials() -> None:
    """As the command writes it, from the trials that are committed."""
    made = summary.rounded(summary.summarise(summary.read()))
    assert read_json(summary.OUT) == made


def test_formats(fields: dict[str, pages.Field]) -> None:
    whole = {"mean": -0.25, "low": -0.5, "high": 0.0, "t": -4.3, "n": 3, "clear": False}
    assert f"{pages.Field(whole):diff.2f}" == "-0.25 (-0.50 to +0.00)"
    assert f"{pages.Field(whole):mean.1f}" == "-0.2 (-0.5 to 0.0)"
    assert f"{pages.Field({**whole, 'low': None}):diff.1f}" == "-0.2 (one seed)"
    assert f"{pages.Field({'mean': 1.0, 'std': 0.125}):±.3f}" == "1.000 ± 0.125"
    assert f"{pages.Field({'mean': 1.0}):±.1f}, {pages.Field(0.5):.2f}" == "1.0, 0.50"
    with pytest.raises(ValueError, match="asks for 'alpha 9', which the results do not have"):
        "{digits[alpha][alpha 9]}".format(**fields)


def trial(label: str, seed: int, value: float, **more: Any) -> dict[str, Any]:
    curve = [{"images": 1.0, "fd_digits": 2 * value}, {"images": 2.0, "fd_digits": value}]
    return {"label": label, "seed": seed, "curve": curve, "failure": "", **more}


def fd(one: summary.Trial) -> float:
    return summary.final(one, "fd_digits")


def test_a_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3 of seeds far apart: 2 ± 4.303 / sqrt(3), t = 2 sqrt(3); not clear.

    Not by place: seeds in another order, and one that the other has not, change nothing.
    """
    trials = [trial("b", seed, 100.0 * seed) for seed in (2, 0, 1, 7)]
    trials += [trial("a", seed, 100.0 * seed + 1 + seed) for seed in (0, 1, 2)]
    found = summary.paired(trials, "a", "b", fd)
    assert found.mean == pytest.approx(2)
    assert found.t == pytest.approx(2 * math.sqrt(3))
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3))
    assert (found.n, found.clear) == (3, False)
    assert summary.interval([1.0, 1.1, 1.2]).clear
    assert summary.interval([-1.0, -1.1, -1.2]).clear
    assert summary.interval([5.0]) == (5.0, None, None, None, 1, False)


def test_differences_that_say_nothing_are_refused() -> None:
    trials = [trial("a", 0, 1.0), trial("b", 1, 1.0), trial("c", 0, 1.0, failure="diverged")]
    with pytest.raises(ValueError, match="'a' and 'b' have no seed in common"):
        summary.paired(trials, "a", "b", fd)
    with pytest.raises(ValueError, match="'a' or 'c' diverged"):
        summary.paired(trials, "a", "c", fd)
    with pytest.raises(ValueError, match="no trial is labelled 'd'; there are a, b, c"):
        summary.paired(trials, "a", "d", fd)


def test_scales_are_chosen_on_one_draw_and_reported_on_another() -> None:
    """LSG 1.2 is the first to reach the other's alignment on the validation noise.

    On the reported noise 1.1 does so, which must not matter; and the recall is the reported one.
    """

    def aligned(label: str, validation: float, report: float, recall: float) -> list[Any]:
        rows = {"fd_digits": 1.0, "precision": 1.0}
        return [
            trial(label, seed, 1.0)
            | {"validation": {**rows, "alignment": validation, "recall": 9.0}}
            | {"report": {**rows, "alignment": report, "recall": recall}}
            | {"curve": [{"images": 1.0, **rows, "recall": recall + seed * 0.01}]}
            for seed in range(3)
        ]

    trials = aligned("Unguided", 0.90, 0.90, 0.7) + aligned("LSG 1.1", 0.94, 0.99, 0.6)
    trials += aligned("LSG 1.2", 0.96, 0.93, 0.5) + aligned("LSG 1.5", 0.99, 0.99, 0.4)
    found = summary.at_equal_alignment(trials + aligned("X", 0.95, 0.95, 0.55), "X")
    assert (found["lsg"], found["scale"], found["grid"]) == ("LSG 1.2", 1.2, [1.0, 1.1, 1.2, 1.5])
    assert found["recall"]["mean"] == pytest.approx(0.05)
    with pytest.raises(ValueError, match="no scale of LSG is as aligned as X; add larger ones"):
        summary.at_equal_alignment(trials + aligned("X", 0.995, 0.9, 0.5), "X")


def test_the_two_draws_share_no_noise() -> None:
    """Each score has its own seeds: 5,000 of the samples, and `MANY` of the alignment."""
    seen: list[list[int]] = []

    class Counting:
        classes = 10

        def sample(self, seeds: list[int]) -> torch.Tensor:
            seen.append(seeds)
            return torch.tensor(seeds)

    sample_metrics = SimpleNamespace(limit=1e9, measure=lambda x: (x, x % 10 * (x % 4 > 0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lab, "score", lambda x, labels, sample_metrics: {"sum": float((labels * 1).sum())}
        )
        found = lab.both_draws(Counting(), sample_metrics, 5000)
    report, validation = ({*seen[0], *seen[1]}, {*seen[2], *seen[3]})
    assert len(report) == len(validation) == lab.MANY
    assert not report & validation
    assert found["report"]["sum"] == 4.5 * 5000
    assert found["report"]["alignment"] == pytest.approx(0.80)  # of 20 labels, 4 are not met


def test_trials_are_kept_with_their_teacher_alone(tmp_path: Path) -> None:
    """A finished trial is found again by label and seed, unless the teacher scores otherwise."""
    out = tmp_path / "digits-x.json"
    assert lab.done(out, {"fd": 1.0}) == {}
    write_json(out, {"teacher": {"fd": 1.0}, "trials": [trial("a", 3, 1.0)]})
    assert lab.done(out, {"fd": 1.0}).keys() == {("a", 3)}
    assert lab.done(out, {"fd": 1.1}) == {}
