"""fewstep train and fewstep distill: which flags are no fields of a run."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from fewstep.cli.recipe_verbs import machine_flags
from fewstep.runs.trackers import TRACKERS
from tests.command import fewstep


def test_the_machine_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    machine_flags(parser)
    assert vars(parser.parse_args([])) == {
        "device": "cpu",
        "timeout": 120.0,
        "shard": 1,
        "track": [],
    }
    words = [word for name in TRACKERS for word in ("--track", name)]
    found = parser.parse_args(["--shard", *words])
    assert (found.shard, found.track) == (0, list(TRACKERS))
    with pytest.raises(SystemExit):
        parser.parse_args(["--track", "none"])
    assert ", ".join(map(repr, TRACKERS)) in capsys.readouterr().err


def test_a_teacher_is_for_distilling_alone() -> None:
    train, distill = fewstep("train", "--help").out, fewstep("distill", "--help").out
    for flag in ("--teacher", "--fake-init", "--size", "--code"):
        assert flag in distill
        assert flag not in train
    assert "fewstep train RECIPE --help lists every field of the recipe." in train
