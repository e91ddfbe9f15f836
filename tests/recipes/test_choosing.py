"""Wishes are read as they are written, and answered in the order of what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from fewstep.config import parse
from fewstep.distillation.method import Method
from fewstep.recipes.choosing import (
    Wish,
    answer,
    command,
    largest,
    measured,
    told,
    wish,
)
from tests.command import fewstep


def row(name: str, place: float, **more: Any) -> dict[str, Any]:
    known = {"family": "f", "needs": "nothing", "calls": 4, "failed": 0, "runs": 5, "seeds": 3}
    setting = f"{name}(sampler=FewStep(steps=4), stage_steps=97)"
    rest = {"guidance": True, "copies": 5.0, "setting": setting}
    places = {"places": {"near": 2}, "of": {"near": 9}, "distances": {"near": 0.25}}
    return {"name": name, "place": place, **known, **rest, **places, **more}


TABLE = {
    "scenes": {"near": "points", "far": "stars"},
    "rows": [
        row("OneCall", 0.0, calls=1),
        row("Third", 0.3),
        row("Data", 0.1, needs="data"),
        row("Second", 0.2, needs="pairs", guidance=False),
        row("Fails", 0.15, failed=1),
    ],
}


def names(text: str) -> list[str]:
    return [found["name"] for found in answer(wish(text), TABLE).rows]


def test_words_of_a_wish() -> None:
    assert wish("no data, 4 steps, 24 GB") == Wish(4, False, False, False, 24.0)
    assert wish("1 call,data , ROBUST,guidance,0.5gib") == Wish(1, True, True, True, 0.5)
    assert wish("robust") == Wish(robust=True)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("no dta, 4 steps", "'no dta' is no part of a wish.*; did you mean 'no data'"),
        ("", "'' is no part of a wish.*; choose from 24 GB, 4 steps, data"),
        ("0 steps", "'0 steps' is no part"),
        ("-3 GB", "'-3 gb' is no part"),
        ("no data 4 steps", "which has commas between its parts"),
    ],
)
def test_other_words_are_refused_with_those_there_are(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        wish(text)
    code, out, err = fewstep("recipes", "--for", text)
    assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_rows_that_suit_in_the_order_of_their_mean_place() -> None:
    assert names("4 steps") == ["Data", "Fails", "Second", "Third"]
    assert names("no data, 4 steps") == ["Fails", "Second", "Third"]
    assert names("no data, 4 steps, robust") == ["Second", "Third"]
    assert names("no data, 4 steps, robust, guidance") == ["Third"]
    assert names("data") == ["OneCall"]


def test_calls_that_were_not_measured_are_answered_by_the_nearest_and_said() -> None:
    assert answer(wish("8 steps"), TABLE).notes == [
        "8 calls were not measured; these are the results of 4"
    ]
    assert names("2 steps") == names("1 step") == ["OneCall"]
    assert names("3 steps") == names("4 steps")
    empty = answer(wish("no data"), {"scenes": {}, "rows": [row("D", 1, needs="data")]})
    assert (empty.rows, len(empty.notes)) == ([], 1)


def test_the_largest_network_by_hand() -> None:
    """Five copies and a gradient of four bytes a weight: 24 GiB hold 2^30 weights."""
    assert largest(row("A", 0), 24) == 2**30
    assert largest(row("A", 0, copies=11.0), 24) == 2**29


def test_the_lengths_of_stages_are_left_out_of_the_command() -> None:
    assert command(row("A", 0)).endswith('--method "A(sampler=FewStep(steps=4))"')
    only = row("A", 0, setting="A(warmup=9, stage_steps=4, rungs=5)")
    assert command(only).endswith('"A(rungs=5)"')


def test_every_command_names_a_method_of_its_calls() -> None:
    for known in measured()["rows"]:
        text = command(known).partition('--method "')[2].rstrip('"')
        method: Any = parse(text, Method)
        assert type(method).__name__ == known["name"]
        made = method.calls if known["name"] == "OptimalSteps" else method.sampler.calls
        assert made == known["calls"], text


def test_the_answer_in_words() -> None:
    lines = told(answer(wish("no data, 4 steps, 24 GB, robust"), TABLE), TABLE)
    text = "\n".join(lines)
    assert lines[0].startswith("by mean place on points and stars;")
    assert "Second (f), from samples of the teacher: 2 of 9 on points (distance 0.25); " in text
    assert "(distance 0.25); no part in stars; 0 of 5 trials failed" in text
    assert "5.0 times the weights while training: in 24 GB a network of 1,074 million" in text
    assert "GB" not in "\n".join(told(answer(wish("4 steps"), TABLE), TABLE))


def test_what_is_shipped_answers_on_the_command_line() -> None:
    """The best of four calls without data is named, with its places and distances."""
    table = measured()
    best = answer(wish("no data, 4 steps, 24 GB"), table).rows[0]
    assert best["needs"] != "data"
    assert all(
        best["place"] <= other["place"]
        for other in table["rows"]
        if other["calls"] == 4 and other["needs"] != "data"
    )
    code, out, err = fewstep("recipes", "--for", "no data, 4 steps, 24 GB")
    assert (code, err) == (0, "")
    assert out.splitlines()[2].startswith(f"{best['name']} (")
    for key, name in table["scenes"].items():
        assert f"{best['places'][key]} of {best['of'][key]} on {name}" in out
        assert f"(distance {best['distances'][key]:.2g})" in out
