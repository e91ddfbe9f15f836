"""Prompts past what a pipeline hears: which are cut, which become equal, and that it is told."""

from __future__ import annotations

import pytest

from fewstep.teachers.diffusers.folder import open_folder
from fewstep.teachers.diffusers.prompt_lengths import heard, lost
from fewstep.teachers.diffusers.text_and_vae import TextAndVAE
from fewstep.training.progress import heard as hearing, remark
from tests.conftest import Folders

LONG = "word " * 900


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "pixart", "sana", "flux"])
def test_what_is_cut_and_what_becomes_equal(folders: Folders, kind: str) -> None:
    """Two that differ behind the limit are one condition; short ones are whole."""
    folder = open_folder(folders(kind))
    prompts = ["a cat", LONG + "a", LONG + "b", "a dog", "a cat", "b" + LONG]
    found = heard(folder, prompts)
    assert (found.prompts, found.cut, found.equal) == (5, 3, 1)
    whole = heard(folder, ["a cat", "a dog"])
    assert (whole.prompts, whole.cut, whole.equal) == (2, 0, 0)
    text = TextAndVAE(folder)
    same, other = text.prompts([LONG + "a", LONG + "b"]), text.prompts(["a cat", "a dog"])
    assert all((tensor[0] == tensor[1]).all() for tensor in same.values())
    assert any((tensor[0] != tensor[1]).any() for tensor in other.values())


def test_it_is_said_once_and_counted(folders: Folders) -> None:
    card = {"teacher": {"folder": str(folders("sd"))}}
    told = lost(card, ["a cat", LONG + "a", LONG + "b"])
    tokens = heard(open_folder(folders("sd")), ["a"]).tokens
    assert told == (
        f"2 of 3 different prompts are longer than the {tokens} tokens that the text encoder "
        "hears, and cut there; 1 cannot be told from an earlier one by the text encoder"
    )
    assert lost(card, ["a cat", "a dog"]) == ""
    assert lost({}, [LONG]) == ""
    said: list[str] = []
    with hearing(said.append):
        remark(told)
        remark("")
    remark(told)  # nobody hears
    assert said == [told]
