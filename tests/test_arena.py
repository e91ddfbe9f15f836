"""The arena: exact distances, budgets by hand, records that cannot be mistaken, fair tuning."""

from __future__ import annotations

import math
import re
import sys
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import fewstep
from fewstep.config import parse
from fewstep.distillation.method import Method
from fewstep.storage.files import read_json

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks are not part of this distribution", allow_module_level=True)
pytest.importorskip("scipy")

from benchmarks.arena import (  # noqa: E402
    __main__ as arena,
    budget,
    entries,
    html_page,
    leaderboard,
    pages,
    records,
    scenes,
    solvers,
)
from fewstep.teachers.gaussian import GaussianMixture  # noqa: E402
from tests.mixture import energy_distance  # noqa: E402


def test_an_entry_or_a_reason_is_of_a_public_method_and_stands_once() -> None:
    taking_part = [one.name for one in entries.ENTRIES]
    assert len(set(taking_part)) == len(taking_part)
    assert not entries.ABSENT.keys() & set(taking_part)
    assert entries.ABSENT.keys() | set(taking_part) <= set(entries.public_methods())


def test_a_method_without_an_entry_is_told_to_be_unmeasured(
    monkeypatch: pytest.MonkeyPatch, summary: dict[str, Any]
) -> None:
    assert "SiD" not in entries.unmeasured()
    with pytest.raises(ValueError, match=r"takes no part; there are SiD"):
        entries.entry("SDI")
    monkeypatch.setattr(entries, "ENTRIES", entries.ENTRIES[1:])
    assert "SiD" in entries.unmeasured()
    assert f"- `SiD` {pages.UNMEASURED}" in pages.arena(summary).splitlines()
    for name, why in (("SiD", "add a line to ENTRIES"), ("Pretrain", "it makes teachers")):
        with pytest.raises(ValueError, match=why):
            entries.entry(name)


def test_every_entry_is_a_method_of_its_calls_with_as_many_trials_as_others() -> None:
    for one in entries.ENTRIES:
        assert len(set(entries.points(one))) == leaderboard.TRIALS == 3
        for calls in one.calls:
            for point in entries.points(one):
                ask = entries.Ask(calls, point.start, 96, True)
                method = one.method(ask, point)
                assert type(method) is one.cls
                made = method.calls if one.name == "OptimalSteps" else method.sampler.calls
                assert made == calls
                assert method.length is None or method.length <= 96 or one.name == "OptimalSteps"


def test_the_distance_of_a_point_to_a_gaussian_is_in_closed_form() -> None:
    """2 E|y| - E|y - y'| = s (pi / 2)^(1/2) (2 - 2^(1/2)) in the plane."""
    for s in (0.5, 2.0):
        law = GaussianMixture([[0.0, 0.0]], s**2)
        found = scenes.energy(torch.zeros(50, 2), law)
        assert found["distance"] == pytest.approx(
            s * math.sqrt(math.pi / 2) * (2 - math.sqrt(2)), rel=1e-5
        )
        assert found["spread"] == 0


def test_the_distance_to_a_mixture_is_that_of_pairs() -> None:
    """Against the mean distance of pairs of samples; exact samples have none; the far are far."""
    law, generator = scenes.MIXTURE, torch.Generator().manual_seed(0)
    x, y, z = (law.sample(3000, generator) for _ in range(3))
    off = 0.7 * x + torch.tensor([0.2, 0.0])
    assert scenes.energy(off, law)["distance"] == pytest.approx(energy_distance(off, y), abs=1e-2)
    assert abs(scenes.energy(z, law)["distance"]) < 6e-4 < scenes.energy(off, law)["distance"]
    assert scenes.energy(z, law)["spread"] == pytest.approx(1, abs=0.02)
    assert scenes.energy(0.5 * z, law)["spread"] == pytest.approx(0.5, abs=0.02)


def test_a_mode_that_is_lost_is_seen() -> None:
    x = scenes.MIXTURE.sample(5000, torch.Generator().manual_seed(0))
    label = torch.cdist(x, scenes.MIXTURE.means).argmin(1)
    assert scenes.least_mode(x, scenes.MIXTURE) == pytest.approx(1, abs=0.1)
    assert scenes.least_mode(x[label != 4], scenes.MIXTURE) < 0.1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> scenes.Scene:
    """The mixture, with a teacher of ten steps and a budget of a moment."""
    home = tmp_path_factory.mktemp("arena") / "teacher"
    sizes: dict[str, Any] = {"budget": 5_000, "samples": 400, "looked": 200, "batch": 16}

    def teach(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scenes, "train", lambda *a, **k: fewstep.train(*a, **{**k, "steps": 10}))
            scenes.teach_points(folder)

    return replace(scenes.scene("mixture"), home=home, teach=teach, **sizes)


@pytest.mark.parametrize(
    ("name", "before", "a_sample"),
    [("VSD", 0, 9), pytest.param("PairRegression", 35, 3, marks=pytest.mark.slow)],
)
def test_a_budget_buys_what_one_counts_by_hand(
    small: scenes.Scene,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    before: int,
    a_sample: int,
) -> None:
    """A forward and a backward, after 35 calls a pair; 4 of a fake score, 5 of a student."""
    monkeypatch.setattr(budget, "FEW", 2)
    one = entries.entry(name)
    rich = replace(small, budget=4096 * before + 16 * a_sample * 100)
    point = entries.points(one)[0]
    cost = budget.affordable(lambda n: one.method(entries.Ask(1, point.start, n), point), rich)
    assert cost.before == 4096 * before
    assert cost.forwards == pytest.approx(16 * a_sample, rel=0.03)
    assert cost.steps == pytest.approx(100, abs=4)
    assert cost.at(cost.steps) <= rich.budget * 1.03


@pytest.mark.slow
def test_a_finished_trial_is_kept_and_made_again_the_same(
    small: scenes.Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of tuning, the best one's other seed, and nothing when it is called again."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(budget, "FEW", 2)
    one = entries.entry("VSD")
    wanted = list(arena.tasks([one], (1,), (0, 1), 3))
    assert [(task.trial, task.seed) for task in wanted] == [
        *((k, 0) for k in range(3)),
        (-1, 0),
        (-1, 1),
    ]
    for task in wanted:
        arena.do(small, task, 3)
    found = records.read(small, "VSD", tmp_path)["records"]
    best = leaderboard.chosen(found, 1, "distance", 3)
    assert [(r["trial"], r["seed"]) for r in found] == [(0, 0), (1, 0), (2, 0), (best, 1)]
    before = (tmp_path / "mixture" / "VSD.json").read_bytes()
    for task in wanted:
        arena.do(small, task, 3)
    assert (tmp_path / "mixture" / "VSD.json").read_bytes() == before
    cost = budget.Cost(**records.read(small, "VSD", tmp_path)["plans"]["1"])
    again = arena.conduct(small, "VSD", 1, 0, 0, cost)
    assert again["test"] == found[0]["test"]
    assert again["test"] != found[0]["validation"]


def planted(record: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A record with other fields, whose digest was made to fit."""
    return records.sealed({**record, **changes})


def test_settings_in_words_read_back() -> None:
    """Every entry's method at each of its trials: nothing is lost that is not the default."""
    for one in entries.ENTRIES:
        for calls, point in ((n, p) for n in one.calls for p in entries.points(one)):
            method = one.method(entries.Ask(calls, point.start, 96, True), point)
            assert parse(records.concise(method), Method) == method


SCENE = scenes.scene("mixture")


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    """A committed record."""
    found: dict[str, Any] = read_json(records.RESULTS / "mixture" / "SiD.json")["records"][0]
    return found


def refused(record: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        records.check(record, records.expected_of(SCENE, record))


def test_a_mislabelled_result_is_refused(real: dict[str, Any]) -> None:
    """Under another method's name, calls, trial or seed, with a digest that was made to fit."""
    records.check(real, records.expected_of(SCENE, real))
    refused(planted(real, name="VSD"), "the record is of method 'SiD.*has 'VSD")
    refused(planted(real, calls=4), "the record is of method|of calls")
    refused(planted(real, trial=1), "the record is of optim|of method")
    refused(planted(real, seed=2), "the record is of seed 0")
    refused({**real, "name": "VSD"}, "not the one that was written")


def test_a_changed_number_is_refused(real: dict[str, Any]) -> None:
    refused({**real, "test": {**real["test"], "distance": 1e-4}}, "digest differs")
    refused({**real, "code": {**real["code"], "sha256": "0" * 16}}, "digest differs")
    refused(planted(real, code={}), "does not say which code")


def test_a_file_holds_one_method_and_one_teacher(real: dict[str, Any], tmp_path: Path) -> None:
    for name, more, match in (
        ("VSD", {}, "VSD.json holds a record of SiD"),
        ("SiD", {"teacher": "other"}, "different teachers"),
    ):
        kept = {"name": name, "plans": {}, "records": [real, planted(real, **more)]}
        arena.write_json(tmp_path / f"{name}.json", kept)
        (tmp_path / "mixture").mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").rename(tmp_path / "mixture" / f"{name}.json")
        with pytest.raises(ValueError, match=match):
            records.read(SCENE, name, tmp_path)


def test_committed_results_are_sound_and_no_method_is_tuned_more() -> None:
    """Every record as it was written; of each method and calls the same trials of tuning."""
    for on in map(scenes.scene, scenes.NAMES):
        for path in sorted((records.RESULTS / on.name).glob("*.json")):
            found = records.read(on, path.stem)["records"]
            if path.stem == "baselines":
                continue
            for calls in {r["calls"] for r in found}:
                mine = [r for r in found if r["calls"] == calls]
                tuned = {(r["trial"], r["seed"]) for r in mine if r["seed"] == 0}
                trials = leaderboard.tuned_equally(found, calls)
                best = leaderboard.chosen(found, calls, on.distance, trials)
                others = {r["trial"] for r in mine if r["seed"]}
                most = leaderboard.TRIALS if calls in entries.CALLS else 1
                assert len(tuned) <= most, path.stem
                assert others <= {best}, path.stem
                assert all(r["seconds"] < 180 for r in mine), path.stem


def record(trial: int, seed: int, validation: float, test: float, **more: Any) -> dict[str, Any]:
    scores = {"validation": {"distance": validation}, "test": {"distance": test}}
    curve = [{"forwards": 10.0, "distance": 2 * test}]
    made = {"calls": 1, "trial": trial, "seed": seed, "failure": "", "curve": curve}
    return {**made, **scores, "forwards": 20, "seconds": 2.0, **more}


def test_settings_are_chosen_on_validation_noise() -> None:
    """The second is best there; on the noise that is reported the first is, which is not seen."""
    found = [record(0, 0, 0.3, 0.1), record(1, 0, 0.2, 0.5), record(2, 0, 0.4, 0.2)]
    assert leaderboard.chosen(found, 1, "distance", 3) == 1
    assert leaderboard.chosen(found[:2], 1, "distance", 3) is None
    assert leaderboard.chosen(found[:1], 1, "distance", 1) == 0
    failed = {**record(1, 0, 0, 0), "validation": {}, "failure": "not finite"}
    assert leaderboard.chosen([found[0], failed, found[2]], 1, "distance", 3) == 0
    assert leaderboard.tuned_equally(found, 1) == 3
    assert leaderboard.tuned_equally(found[:2], 1) == 1


def test_calls_between_take_over_the_settings_of_four() -> None:
    """One trial each, whatever would have been best for themselves."""
    four = [record(k, 0, (0.3, 0.2, 0.4)[k], 0.1, calls=4) for k in range(3)]
    eight = [record(1, seed, 0.9, 0.1 * seed, calls=8) for seed in range(3)]
    assert leaderboard.chosen(four, 8, "distance", 3) == 1
    assert leaderboard.chosen(eight, 8, "distance", 3) is None
    one = entries.entry("SiD")
    wanted = list(arena.tasks([one, entries.entry("ASD")], (1, 4, 8), (0, 1), 3))
    assert [tuple(task[1:]) for task in wanted if task.calls == 8] == [(8, -1, 0), (8, -1, 1)]
    line = leaderboard.by_calls(one, [*four, *eight, record(0, 0, 0.1, 7.0, calls=8)], SCENE)
    assert line is None  # of 1, 2, 4 and 8 calls no more than are tuned
    three = [*four, *eight, *(record(k, 0, 0.1 * k, 0.5) for k in range(3))]
    line = leaderboard.by_calls(one, three, SCENE)
    assert line is not None
    means = {calls: of["mean"] for calls, of in line["calls"].items()}
    assert means == pytest.approx({"1": 0.5, "4": 0.1, "8": 0.1})


def of_a_scene(distances: dict[str, float]) -> dict[str, Any]:
    """A leaderboard of four calls."""
    known = {"family": "f", "needs": "data", "calls": 4, "setting": "", "seeds": 3, "copies": 4.0}
    rest = {"tuned": 3, "runs": 5, "worse": 1}
    rows = [
        {"name": name, "scores": {"d": {"mean": value}}, **known, **rest}
        for name, value in distances.items()
    ]
    ddim = [
        {"name": "DDIM", "calls": calls, "scores": {"d": 1.0 / calls}} for calls in (2, 4, 8, 16)
    ]
    span = {"mean": 0.2, "low": 0.1, "high": 0.3}
    lines = [{"name": "SiD", "calls": {"2": span, "4": span}}]
    return {"distance": "d", "rows": rows, "baselines": ddim, "by_calls": lines}


def test_choices_are_in_the_order_of_their_mean_place() -> None:
    """SiD is first and third, VSD second twice; MSD is on digits alone, where it is first."""
    both = {
        "mixture": of_a_scene({"SiD": 0.1, "VSD": 0.2, "DMD": 0.3}),
        "digits": of_a_scene({"MSD": 1.0, "VSD": 2.0, "SiD": 3.0}),
    }
    rows = pages.choices(both)["rows"]
    assert [(row["name"], row["place"]) for row in rows] == [
        ("MSD", 1.0),
        ("SiD", 2.0),
        ("VSD", 2.0),
        ("DMD", 3.0),
    ]
    sid = rows[1]
    assert sid["places"] == {"mixture": 1, "digits": 3}
    assert sid["of"] == {"mixture": 3, "digits": 3}
    assert (sid["runs"], sid["failed"], sid["distances"]["digits"]) == (10, 2, 3.0)
    assert [pages.shown(rows[0], scene) for scene in pages.CHOSEN] == ["-", "1 (1)"]


def test_a_student_behind_ddim_in_twice_its_calls_is_marked() -> None:
    """0.2 in two calls is before 1/4; in four it is behind 1/8."""
    table = pages.by_calls("digits", of_a_scene({}))
    assert list(table.rows[0]) == ["DDIM in twice the calls", "0.25", "0.125"]
    assert list(table.rows[2]) == ["`SiD`", "0.2 (0.1 to 0.3)", "0.2 (0.1 to 0.3) !"]


def test_time_to_a_mark_is_that_of_the_first_look_there() -> None:
    run = record(0, 0, 0.1, 0.1)
    assert leaderboard.reached(run, "distance", 0.2) == {"forwards": 10, "seconds": 1}
    assert leaderboard.reached(run, "distance", 0.15)["forwards"] == 20
    assert leaderboard.reached(run, "distance", 0.05) is None
    both = [run, record(0, 1, 0.1, 0.3)]
    slow = leaderboard.speed(both, "distance", 0.2)
    assert (slow["forwards"], slow["reached"]) == (None, 1)
    assert leaderboard.speed(both, "distance", 0.3)["forwards"] == 15


def test_ties_are_differences_that_are_not_clear() -> None:
    """Seed by seed: 0.1 behind each time is clear, however far the seeds are apart."""
    best = {"calls": 1, "each": {"0": 1.0, "1": 2.0, "2": 4.0}}
    near = {"calls": 1, "each": {"0": 1.0, "1": 3.0, "2": 3.5}}
    behind = {"calls": 1, "each": {"0": 1.1, "1": 2.11, "2": 4.12}}
    rows = [best, near, behind]
    leaderboard.ties(rows)
    assert [row["tie"] for row in rows] == [True, True, False]


def test_noise_is_the_deviation_of_one_draw() -> None:
    runs = [record(0, seed, 0.1 + 0.02 * (-1) ** seed, 0.1) for seed in range(8)]
    assert leaderboard.noise(runs, "distance") == pytest.approx(0.02 / math.sqrt(2))


def test_solvers_make_the_calls_they_are_asked_for() -> None:
    """Heun's are odd: the most that are not more."""
    for solver, calls in solvers.asked():
        for trial in range(3):
            made = solvers.sampler_of(solver, calls, trial).calls
            assert made == (2 * ((calls + 1) // 2) - 1 if solver == "Heun" else calls)


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    found: dict[str, Any] = read_json(pages.SUMMARY)
    return found


def test_the_summary_is_that_of_the_records(summary: dict[str, Any]) -> None:
    """As the command writes it, from the trials that are committed."""
    assert leaderboard.summarise() == summary


def test_every_method_of_the_mixture_was_tuned_by_three_trials(summary: dict[str, Any]) -> None:
    rows = summary["mixture"]["rows"]
    assert {row["tuned"] for row in rows} == {leaderboard.TRIALS}
    asked = {(e.name, n) for e in entries.ENTRIES if "mixture" in e.scenes for n in e.calls}
    missing = set(summary["mixture"]["missing"])  # the page names them
    assert {(n, c) for n, c in asked if f"{n} in {c}" not in missing} == {
        (row["name"], row["calls"]) for row in rows
    }
    assert {row["tuned"] for row in summary["mixture"]["baselines"]} == {leaderboard.TRIALS}


def test_the_pages_are_those_of_the_summary(summary: dict[str, Any]) -> None:
    """Every figure is a field of the results; prose holds none but settings.

    Which methods were not measured is not compared: a new one need not write the page anew.
    """
    table = pages.choices(summary)
    docs = ROOT / "docs"
    page = (docs / "arena.md").read_text(encoding="utf-8").splitlines()
    written, made = (
        [line for line in lines if not line.endswith(pages.UNMEASURED)]
        for lines in (page, pages.arena(summary).splitlines())
    )
    assert written == made
    stale = {line for line in page if line.endswith(pages.UNMEASURED)}
    assert stale <= {f"- `{name}` {pages.UNMEASURED}" for name in entries.unmeasured()}
    assert (docs / "choosing.md").read_text(encoding="utf-8") == pages.choosing(table)
    assert read_json(pages.CHOICES) == table
    sys.path.append(str(ROOT / "benchmarks"))
    unbacked = import_module("pages").unbacked
    for name in ("arena.md", "choosing.md"):
        assert unbacked(pages.template(name), frozenset({"95 %"})) == []
    for name in pages.pictures(summary):
        assert (docs / "images" / name).is_file()


def test_a_changed_result_changes_the_page(summary: dict[str, Any]) -> None:
    """The distance, the interval, the place, what was counted."""
    before = pages.arena(summary)
    for path, value in (
        (("rows", 0, "scores", "distance", "mean"), 0.5),
        (("rows", 0, "name"), "Other"),
        (("rows", 3, "seconds"), 99.0),
        (("baselines", 0, "scores", "distance"), 0.7),
        (("trials",), 10_000),
    ):
        changed = deepcopy(summary)
        place: Any = changed["mixture"]
        for key in path[:-1]:
            place = place[key]
        assert place[path[-1]] != value
        place[path[-1]] = value
        assert pages.arena(changed) != before, path


def test_figures_keep_what_matters() -> None:
    assert pages.figure(0.0123456) == "0.0123"
    assert pages.figure(456.78) == "457"
    assert pages.figure(123456.0) == "123,000"
    assert pages.figure(None) == pages.NONE
    known = {"mean": 0.001, "low": 0.0005, "high": 0.0015}
    assert pages.interval(known, 1000) == "1 (0.5 to 1.5)"
    assert pages.interval({**known, "low": None}, 1000) == "1"


def test_a_picture_stands_alone(summary: dict[str, Any]) -> None:
    """An SVG with its own colours, light and dark, which refers to nothing outside it."""
    one = pages.ranks("mixture", summary["mixture"], 1)
    assert one is not None
    text = pages.standalone(one)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    used = set(re.findall(r"var\(--(\w+)\)", text))
    assert used <= set(re.findall(r"--(\w+):", text))
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"(href|url\()=?.?http", text)


def test_the_page_for_a_browser_holds_all_and_refers_to_nothing_outside(
    summary: dict[str, Any],
) -> None:
    texts = pages.arena(summary), pages.choosing(read_json(pages.CHOICES))
    html = html_page.page(summary, texts, pages.pictures(summary))
    links = re.findall(r'(?:href|src)="([^"]*)"', html)
    ids = set(re.findall(r' id="([^"]+)"', html))
    assert len(links) > 6
    assert all(link[0] == "#" and link[1:] in ids for link in links)
    tables = sum(text.count("| --- |") > 0 for text in "\n".join(texts).split("\n\n"))
    assert html.count("<table") == tables
    assert len(set(re.findall(r'aria-label="(Table[^"]*)"', html))) == tables
    for scene in summary:
        best = next(row["name"] for row in summary[scene]["rows"] if row["calls"] == 1)
        assert f"<b>{best}</b><span>{scene}, one call</span>" in html
    assert "{{" not in html


def test_a_table_for_a_browser_tells_numbers_from_words() -> None:
    rows = [["place", "method", "distance", "failed"], ["---"] * 4]
    rows += [["1", "`SiD`", "2.5 (1 to 4)", "0 of 5"], ["2=", "`DMD2`", "diverged", "1 of 5"]]
    html = html_page.table(rows)
    assert '<th scope="col">place</th><th scope="col" class="name">method</th>' in html
    dot = '<i class="dot score-identity" title="score identity"></i>'
    assert f'<td class="name">{dot}<code>SiD</code></td>' in html
    spread = '2.5 <span class="between">1 to 4</span>'
    assert f'<td class="number spread">{spread}</td><td class="number">0 of 5</td>' in html
    assert "tall" not in html
    assert 'class="scroll tall"' in html_page.table([*rows, *rows[2:] * 10])
    inline = html_page.inline("[a](choosing.md#x) [b](other.md) `c<d` **e**")
    assert inline == '<a href="#choosing-a-method">a</a> b <code>c&lt;d</code> <b>e</b>'
