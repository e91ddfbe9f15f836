"""The flags of sampling are the fields of `Sampling`, and their choices its types."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from fewstep.cli.sampling import Sampling
from fewstep.cli.sampling_flags import NAMES, SCHEDULES, SOLVERS, sampling_flags


def test_each_flag_is_a_field_and_none_is_the_default() -> None:
    parser = argparse.ArgumentParser()
    sampling_flags(parser)
    flags = vars(parser.parse_args([]))
    assert flags == dict.fromkeys(NAMES)
    assert set(NAMES) == {field.name for field in fields(Sampling)}
    assert Sampling.asked(argparse.Namespace(**flags)) == Sampling()


def test_choices(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    sampling_flags(parser)
    for name, choices in (("solver", SOLVERS), ("schedule", SCHEDULES)):
        for choice in choices:
            found = Sampling.asked(parser.parse_args([f"--{name}", choice]))
            assert found == Sampling(**{name: choice})
        with pytest.raises(SystemExit):
            parser.parse_args([f"--{name}", "none"])
        assert ", ".join(map(repr, choices)) in capsys.readouterr().err
