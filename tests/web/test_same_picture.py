"""The lines and commands themselves; tests/web/test_making.py runs them."""

from __future__ import annotations

import shlex

from fewstep.web.picture_request import PictureRequest
from fewstep.web.same_picture import Opened, command, python

STUDENT, TEACHER = Opened("runs/sid"), Opened("runs/my teacher")
EXACT = Opened(expression="Ring().exact()", imports="from fewstep.domains.ring import Ring")


def test_the_shortest() -> None:
    asked = PictureRequest(seed=7)
    assert python(STUDENT, None, asked) == (
        "from fewstep import open_model\nmodel = open_model('runs/sid')\nx = model.sample([7])"
    )
    assert command(STUDENT, None, asked) == "fewstep sample runs/sid --seeds 7 --out picture.png"


def test_everything() -> None:
    """Steps and guidance are each side's own; numbers keep all of their digits."""
    asked = PictureRequest(
        "variations", 7, 100, None, "it's", 2, 30, 1 / 3, share=0.1 + 0.2, count=4
    )
    assert python(TEACHER, STUDENT, asked).splitlines() == [
        "from fewstep import open_model, variations",
        "model = open_model('runs/my teacher').in_steps(30).guided(0.3333333333333333)",
        "student = open_model('runs/sid').in_steps(2)",
        'x = variations(model, 7, range(100, 104), 0.30000000000000004, prompt="it\'s", '
        "source=student)",
    ]
    assert shlex.split(command(STUDENT, None, asked)) == [
        *("fewstep", "sample", "runs/sid", "--seeds", "7,100-103"),
        *("--vary", "0.30000000000000004", "--prompts=it's", "--steps", "2"),
        *("--out", "variations.png"),
    ]
    assert command(TEACHER, STUDENT, asked) == ""


def test_what_has_no_command() -> None:
    """Prompts that would be read from a file, and a teacher that is in none."""
    assert command(STUDENT, None, PictureRequest(prompt="about notes.txt")) == ""
    dash = command(STUDENT, None, PictureRequest(prompt="--out x.png is an odd prompt"))
    assert "--prompts=--out x.png is an odd prompt" in shlex.split(dash)
    assert command(EXACT, STUDENT, PictureRequest()) == ""
    assert python(EXACT, STUDENT, PictureRequest("walk", 1, 2, count=5)).splitlines() == [
        "from fewstep import walk",
        "from fewstep.domains.ring import Ring",
        "model = Ring().exact()",
        "x = walk(model, 1, 2, 5)",
    ]


def test_an_autoencoder_is_named() -> None:
    opened = Opened("edm2.pkl", "vae")
    asked = PictureRequest("grid", 3, count=2, label=5)
    assert python(opened, None, asked).splitlines()[1:] == [
        "model = open_model('edm2.pkl', vae='vae')",
        "x = model.sample(range(3, 5), [5] * 2)",
    ]
    assert command(opened, None, asked) == (
        "fewstep sample edm2.pkl --seeds 3-4 --labels 5 --vae vae --out grid.png"
    )
