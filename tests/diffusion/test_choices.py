"""A wrong value of any field whose type is a Literal is refused, by the field's name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest

from fewstep.diffusion.choices import require_choices

Colour = Literal["red", "green", "blue"]


@dataclass(frozen=True)
class Picture:
    """One of each kind of field."""

    kind: ClassVar[Literal["a"]] = "a"
    colour: Colour = "red"
    depth: Literal[8, 16] = 8
    only: Literal["one"] = "one"
    size: int | Literal["auto"] = 3
    name: str = ""
    known: str = field(default="x", init=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"colour": "pink"}, "Picture.colour is 'red', 'green' or 'blue', got 'pink'"),
        ({"depth": 4}, "Picture.depth is 8 or 16, got 4"),
        ({"only": "two"}, "Picture.only is 'one', got 'two'"),
        ({"depth": 4, "colour": None}, "Picture.colour is 'red', 'green' or 'blue', got None"),
    ],
)
def test_another_value_is_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require_choices(Picture(**wrong))


def test_every_value_named_is_accepted_and_other_types_are_not_looked_at() -> None:
    colours: tuple[Colour, ...] = ("red", "green", "blue")
    for colour in colours:
        require_choices(Picture(colour, 16, size="auto", name="pink"))
    unknown: Any = "some"
    require_choices(Picture(size=unknown))


def test_types_out_of_reach_are_left_alone() -> None:
    """A class in a function, whose annotations nobody else can look up."""
    mine = Literal["a", "b"]

    @dataclass(frozen=True)
    class Local:
        kind: mine

    wrong: Any = "c"
    require_choices(Local(wrong))
