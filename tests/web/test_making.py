"""Streams of events, and that the Python and the commands they hand out make the same pictures."""

from __future__ import annotations

import base64
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.cli.serve import open_sides
from fewstep.data.image_grid import grid, png
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.pixels import NotFinite
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.domains.ring import Ring
from fewstep.web.making import POINTS, Side, events, limits, seeds_of
from fewstep.web.picture_request import Limits, PictureRequest
from fewstep.web.same_picture import Opened
from tests.command import fewstep

Asked = PictureRequest


@pytest.fixture(scope="module")
def sides(finished: Path) -> list[Side]:
    return open_sides(finished / "runs/sid", "", False, "", "cpu")


def made(sides: list[Side], request: PictureRequest) -> dict[str, dict[str, Any]]:
    found = [event for event in events(sides, request) if event["event"] == "made"]
    return {event["side"]: event for event in found}


def decoded(uri: str) -> bytes:
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(body)


def run(python: str) -> Tensor:
    """What the lines leave in x."""
    names: dict[str, Any] = {}
    exec(compile(python, "copied", "exec"), names)
    x: Tensor = names["x"]
    return x


REQUESTS = (
    Asked(seed=7),
    Asked(seed=7, label=3, steps=3, teacher_steps=5, guidance=2.5),
    Asked(seed=7, label=10),
    Asked("grid", seed=4, count=12),
    Asked("grid", seed=4, label=1, count=4, steps=2),
    Asked("walk", seed=3, other=8, count=5, label=6),
    Asked("walk", seed=3, other=8, count=4, steps=4, teacher_steps=3),
    Asked("variations", seed=3, other=100, count=3, share=0.35),
    Asked("variations", seed=3, other=100, count=2, share=0.123456789, label=2, steps=2),
)


@pytest.mark.parametrize("request_", REQUESTS, ids=range(len(REQUESTS)))
def test_what_is_copied_makes_the_same_pictures(
    sides: list[Side], request_: PictureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: the PNG of the page, of the Python lines, and of the command."""
    monkeypatch.chdir(tmp_path)
    found = made(sides, request_)
    assert list(found) == ["student", "teacher"]
    for side, event in found.items():
        shown = decoded(event["png"])
        every = request_.kind == "grid" and request_.label is None and request_.count >= 10
        assert png(grid(run(event["python"]), 10 if every else None)) == shown
        other = event["command"]
        if side == "teacher" and request_.kind == "variations":
            assert other == ""
            continue
        assert fewstep(*shlex.split(other)[1:]).code == 0
        assert (tmp_path / f"{request_.kind}.png").read_bytes() == shown
    assert found["student"]["png"] != found["teacher"]["png"]


def test_states_are_those_of_the_samplers(sides: list[Side]) -> None:
    """Every step, in order, with its time, level and calls; the last one is the picture."""
    told = list(events(sides, Asked(seed=7, label=3, steps=2, teacher_steps=4)))
    kinds = [(event["event"], event["side"]) for event in told]
    assert kinds == [
        ("start", "student"),
        *[("state", "student")] * 2,
        ("made", "student"),
        ("start", "teacher"),
        *[("state", "teacher")] * 4,
        ("made", "teacher"),
    ]
    student, teacher = sides[0].generator, sides[1].generator
    assert [event["calls"] for event in told] == [2, 1, 2, 2, 7, 1, 3, 5, 7, 7]
    assert [e["t"] for e in told if e["event"] == "state"][:2] == [2.5, 1.25]
    shares = [e["share"] for e in told if e["event"] == "state"]
    assert shares[:2] == pytest.approx([2.5 / 3.5, 1.25 / 2.25])
    assert shares[2] == pytest.approx(80 / 81)
    last = [e for e in told if e["event"] in ("state", "made") and e["side"] == "teacher"][-2:]
    assert last[0]["png"] == last[1]["png"]
    x = replace(student, sampler=FewStep(2.5, 2)).sample([7], [3])
    assert decoded(told[2]["png"]) == png(grid(x))
    assert isinstance(teacher.sampler, Heun)
    assert decoded(told[1]["png"]) == png(grid(student.sample([7], [3])))  # of the same first call
    assert told[1]["noisy"] not in (told[1]["png"], told[2]["noisy"])
    assert told[2]["ms"] > told[1]["ms"] > 0


def test_calls_are_counted_at_the_network(sides: list[Side]) -> None:
    """Twice with guidance; and no ear stays behind."""
    found = made(sides, Asked(seed=1, guidance=2.0, teacher_steps=3))
    assert found["teacher"]["calls"] == 10
    assert found["student"]["calls"] == 1
    assert made(sides, Asked(seed=1, teacher_steps=3))["teacher"]["calls"] == 5
    assert not sides[1].generator.denoiser._forward_pre_hooks


def test_walks_are_frames_and_variations_start_at_the_student(sides: list[Side]) -> None:
    walk = made(sides, Asked("walk", seed=3, other=8, count=4))["teacher"]
    alone = made(sides, Asked(seed=3, label=3))["teacher"]
    assert len(walk["frames"]) == 4
    assert len(set(walk["frames"])) == 4
    assert decoded(walk["frames"][0])[:8] == b"\x89PNG\r\n\x1a\n"
    near = made(sides, Asked("variations", seed=3, share=0.01, count=1))
    assert "source=student" in near["teacher"]["python"]
    mine, its = (run(made(sides, Asked(seed=3))[side]["python"]) for side in near)
    x = run(near["teacher"]["python"])
    assert (x - mine).abs().mean() < 0.05 < (mine - its).abs().mean()
    assert "frames" not in alone


def test_points_are_numbers() -> None:
    """A thousand of them, of as many seeds; and the lines of an exact teacher."""
    exact = Ring(3, 2.0).exact()
    ring = Opened(
        expression="Ring(3, 2.0).exact()", imports="from fewstep.domains.ring import Ring"
    )
    mine = replace(ring, expression="Ring(3, 2.0).exact().in_steps(3)")
    both = [Side("student", exact.in_steps(3), mine), Side("teacher", exact, ring)]
    found = made(both, Asked(seed=5))["teacher"]
    x = run(found["python"])
    assert x.shape == (POINTS, 2)
    assert torch.allclose(torch.tensor(found["points"]), x, atol=1e-4)
    assert found["command"] == ""
    assert decoded(found["png"]) == png(grid(x))
    state = next(e for e in events(both, Asked(seed=5)) if e["event"] == "state")
    assert len(state["points"]) == len(state["noisy_points"]) == POINTS
    walk = made(both, Asked("walk", seed=1, other=2, count=64))["student"]
    assert len(walk["points"]) == 64
    assert torch.allclose(torch.tensor(walk["points"][0]), run(walk["python"])[0], atol=1e-4)
    assert list(seeds_of(Asked(seed=5), True)) == list(range(5, 1005))


def test_limits_are_those_of_the_models(sides: list[Side]) -> None:
    assert limits(sides) == Limits(10, False, True, False)
    ring = [Side("student", Ring().exact(), Opened("ring"))]
    assert limits(ring) == Limits(0, False, False, True)


def test_samples_that_are_not_finite(sides: list[Side]) -> None:
    def broken(x: Tensor) -> Tensor:
        return x / 0

    bad: Generator = replace(sides[0].generator, decode=broken)
    with pytest.raises(NotFinite):
        list(events([replace(sides[0], generator=bad)], Asked(seed=1)))


@pytest.mark.slow
def test_prompts(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline, whose latents are decoded at every step; its commands and its Python."""
    monkeypatch.chdir(tmp_path)
    folder = folders("sd")
    both = open_sides(folder, str(folder), False, "", "cpu")
    assert limits(both) == Limits(0, True, True, False)
    prompt = 'it\'s a "red" cube; $HOME'
    for asked in (
        Asked(seed=3, prompt=prompt, steps=2, teacher_steps=3, guidance=4.0),
        Asked("grid", seed=3, prompt=prompt, steps=1, teacher_steps=2, count=3),
        Asked("walk", seed=3, other=9, prompt=prompt, steps=1, teacher_steps=2, count=3),
        Asked("variations", seed=3, prompt=prompt, steps=2, teacher_steps=2, count=2),
    ):
        for event in made(both, asked).values():
            shown = decoded(event["png"])
            assert png(grid(run(event["python"]))) == shown
            if event["command"]:
                assert fewstep(*shlex.split(event["command"])[1:]).code == 0
                assert Path(f"{asked.kind}.png").read_bytes() == shown
    file = made(both, Asked(seed=1, prompt="notes.txt", steps=1, teacher_steps=1))
    assert file["student"]["command"] == ""
