"""A negative prompt of a run: what the teacher is guided away from, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import Folders

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from fewstep.domains.prompts import Prompts
from fewstep.methods.sid import SiD
from fewstep.recipes.sid_text_to_image import RECIPES
from fewstep.runs.teacher import load_teacher
from fewstep.teachers.diffusers.adapter_base import adapter_of


def null(teacher: Any) -> torch.Tensor:
    """The embedding of what guidance leads away from."""
    net = adapter_of(teacher.denoiser)
    assert net is not None
    return net.null()["prompt"]


def test_the_teacher_of_a_run_is_guided_away_from_it(folders: Folders) -> None:
    folder = str(folders("sd"))
    plain = load_teacher(Prompts("prompts.txt"), folder)
    asked = load_teacher(Prompts("prompts.txt", negative="a red cube"), folder)
    assert plain is not None
    assert plain.text is not None
    words = plain.text(["", "a red cube"])["prompt"]  # type: ignore[index]
    assert torch.allclose(null(plain), words[0], atol=1e-6)
    assert torch.allclose(null(asked), words[1], atol=1e-6)
    assert not torch.allclose(words[0], words[1], atol=1e-3)


def test_it_needs_guidance() -> None:
    run = RECIPES["sid_lsg_sd15"]()
    asked = Prompts("prompts.txt", negative="blurry")
    assert replace(run, domain=asked).domain == asked
    unguided = replace(run, method=SiD())
    with pytest.raises(ValueError, match=r"guidance leads away from, and SiD\(.* has none"):
        replace(unguided, domain=asked)
