"""Requests field by field: what is read, and one sentence for everything else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fewstep.web.picture_request import Limits, PictureRequest, read

DIGITS = Limits(classes=10, teacher=True)
TEXT = Limits(prompts=True, teacher=True)
POINTS = Limits(points=True)


def ask(limits: Limits = DIGITS, **fields: Any) -> PictureRequest:
    return read(json.dumps(fields).encode(), limits)


def test_what_is_asked_for() -> None:
    assert ask() == PictureRequest()
    assert ask(seed=7, label=10, steps=8, teacher_steps=100, guidance=2) == PictureRequest(
        seed=7, label=10, steps=8, teacher_steps=100, guidance=2.0
    )
    assert ask(kind="variations", other=5, share=0.25, count=16).share == 0.25
    assert ask(kind="walk", seed=2**31 - 1, other=0, count=2).seed == 2**31 - 1
    assert ask(label=None, steps=None, prompt=None) == PictureRequest()
    assert ask(TEXT, prompt="a red cube").prompt == "a red cube"
    assert ask(POINTS, kind="walk", count=64).count == 64


@pytest.mark.parametrize(
    ("limits", "fields", "message"),
    [
        (DIGITS, {"kind": "film"}, 'kind is one of picture, grid, walk, variations, got "film"'),
        (DIGITS, {"kind": ["grid"]}, "kind is one of"),
        (DIGITS, {"seed": -1}, "seed is a whole number from 0 to 2.14748e+09, got -1"),
        (DIGITS, {"seed": 2**31}, "seed is a whole number from 0"),
        (DIGITS, {"seed": 1.5}, "seed is a whole number from 0"),
        (DIGITS, {"seed": True}, "seed is a whole number from 0 to 2.14748e+09, got true"),
        (DIGITS, {"seed": "7"}, 'got "7"'),
        (DIGITS, {"seed": None}, "got null"),
        (DIGITS, {"steps": 9}, "steps is a whole number from 1 to 8, got 9"),
        (DIGITS, {"steps": 0}, "steps is a whole number from 1 to 8, got 0"),
        (DIGITS, {"teacher_steps": 101}, "teacher_steps is a whole number from 1 to 100"),
        (DIGITS, {"label": 11}, "label is a whole number from 0 to 10, got 11"),
        (DIGITS, {"guidance": 31}, "guidance is a number from 0 to 30, got 31"),
        (DIGITS, {"share": 1}, "share is a number from 0.01 to 0.99, got 1"),
        (DIGITS, {"share": {"a": 1}}, "share is a number"),
        (DIGITS, {"count": 2}, "count is a whole number from 1 to 1 for a picture, got 2"),
        (DIGITS, {"kind": "grid", "count": 65}, "count is a whole number from 1 to 64, got 65"),
        (DIGITS, {"kind": "walk", "count": 17}, "from 2 to 16 for a walk, got 17"),
        (DIGITS, {"kind": "walk", "seed": 1, "count": 4}, "choose two that differ"),
        (DIGITS, {"prompt": "a cat"}, "this model takes no prompt"),
        (DIGITS, {"sed": 1}, "there is no field 'sed'; did you mean 'seed'?"),
        (DIGITS, {"path": "/etc/passwd"}, "there is no field 'path'"),
        (TEXT, {}, "this model needs a prompt"),
        (TEXT, {"prompt": " "}, "prompt is a text of 1 to 500 characters"),
        (TEXT, {"prompt": "a" * 501}, 'prompt is a text of 1 to 500 characters, got "aaa'),
        (TEXT, {"prompt": ["a"]}, "prompt is a text of 1 to 500"),
        (TEXT, {"prompt": "a\nb"}, "prompt is one line of text, without control"),
        (TEXT, {"prompt": "a", "label": 1}, "label is a whole number from 0 to 0"),
        (TEXT, {"prompt": "a", "label": 0}, "this model takes no label"),
        (TEXT, {"prompt": "a", "kind": "grid", "count": 9}, "from 1 to 8 for a grid, got 9"),
        (POINTS, {"guidance": 2.0}, "guidance needs prompts or labels"),
        (Limits(kinds=("picture",)), {"kind": "variations"}, "kind is one of picture, got"),
    ],
    ids=range(32),
)
def test_one_sentence(limits: Limits, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ask(limits, **fields)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"[]", b"3", b'{"seed": NaN}', b'{"share": Infinity}', b"[" * 4000],
    ids=range(8),
)
def test_what_is_no_request(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"the request is (not JSON|a JSON object of fields)"):
        read(body, DIGITS)
    with pytest.raises(ValueError, match="share is a number from"):
        read(b'{"share": 1e999}', DIGITS)
    with pytest.raises(ValueError, match="seed is a whole number"):
        read(b'{"seed": 1' + b"0" * 3000 + b"}", DIGITS)
