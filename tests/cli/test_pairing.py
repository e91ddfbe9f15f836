"""Which prompt is made with which seed, in both pairings, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.cli.pairing import numbers, paired, texts_of


@pytest.fixture
def three(tmp_path: Path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\nc\n")
    return str(file)


def test_in_turn_aloud(three: str) -> None:
    fewer = paired(three, [5, 6])
    assert (fewer.texts, fewer.seeds, fewer.columns) == (["a", "b"], [5, 6], None)
    assert fewer.told == (
        "prompts and seeds are paired in order (seed 5: 'a', seed 6: 'b'); the last 1 of 3 "
        "prompts have no seed and get no picture; --pairing every makes every prompt with every "
        "seed"
    )
    more = paired(three, [0, 1, 2, 3])
    assert more.texts == ["a", "b", "c", "a"]
    assert (
        "(seed 0: 'a', seed 1: 'b', seed 2: 'c', ...); the 3 prompts are taken in turn for 4 "
        "seeds; --pairing every"
    ) in more.told
    one = paired("a cat", [0])
    assert one.told == "prompts and seeds are paired in order (seed 0: 'a cat')"


def test_every_prompt_with_every_seed(three: str) -> None:
    """A row of the grid a prompt, a column a seed."""
    found = paired(three, [5, 9], "every")
    assert found.texts == ["a", "a", "b", "b", "c", "c"]
    assert found.seeds == [5, 9, 5, 9, 5, 9]
    assert found.columns == 2
    assert found.told.startswith("each of 3 prompts is made with each of 2 seeds: 6 pictures")
    with pytest.raises(ValueError, match=r"3 prompts with 400,000 seeds each are 1,200,000"):
        paired(three, range(400_000), "every")


def test_texts_and_numbers(three: str) -> None:
    assert texts_of(three) == ["a", "b", "c"]
    assert texts_of("a red cube, 3.5 cm") == ["a red cube, 3.5 cm"]
    assert numbers("0-3, 7", "--seeds") == [0, 1, 2, 3, 7]
    for wrong in ("3-1", "a", "1-2-3", "0-2000000", str(2**63)):
        with pytest.raises(ValueError, match="--seeds"):
            numbers(wrong, "--seeds")
