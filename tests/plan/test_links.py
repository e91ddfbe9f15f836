"""What connects GPUs is positive, and the command line says which flag is not."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from fewstep.plan.links import Links
from tests.command import fewstep

FLAGS = ("--gpus", "2x80GB")


@pytest.mark.parametrize("name", [field.name for field in fields(Links)])
def test_rates_and_times_are_positive(name: str) -> None:
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="links have positive rates and times"):
            replace(Links(), **{name: wrong})
    flag = f"--{name.replace('_', '-')}"
    done = fewstep("plan", "none", *FLAGS, flag, "0")
    assert (done.code, done.err) == (2, f"fewstep: {flag} is a positive number, got 0\n")
