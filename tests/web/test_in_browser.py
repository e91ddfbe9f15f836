"""The playground in a real browser, and under hostile requests."""

from __future__ import annotations

import base64
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fewstep.data.image_grid import grid, png
from tests.browser import CHROMIUM, Browser
from tests.hostile_requests import ask, hostile, normal
from tests.web.served import Served
from tests.web.test_making import run

pytestmark = pytest.mark.slow
DONE = "document.getElementById('status').textContent.startsWith('done')"
FOCUSED = "document.activeElement"


def saved(browser: Browser, side: str) -> bytes:
    """The file that the link of a panel saves."""
    uri = browser.ask(f"document.querySelector('.{side} .save a').href")
    return base64.b64decode(uri.partition(",")[2])


def tab_to(browser: Browser, condition: str) -> None:
    """Press Tab until the focused element fulfils a condition."""
    for _ in range(40):
        browser.press("Tab")
        if browser.ask(f"Boolean({FOCUSED}.{condition})"):
            return
    raise AssertionError(f"the keyboard does not reach {condition}")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_visit(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load, generate, slide, save, wrong input, a server that is gone: by the keyboard alone."""
    monkeypatch.chdir(finished)
    with Served(finished, "runs/sid") as served, Browser(390, 844) as browser:
        browser.open(served.address)
        browser.wait(DONE)
        assert browser.ask("location.search") == ""  # the token has left the address
        assert browser.ask("document.documentElement.scrollWidth") <= 390

        browser.press("Tab")
        assert browser.ask(f"{FOCUSED}.className") == "skip"
        tab_to(browser, "name === 'kind'")
        browser.press("ArrowRight")
        browser.press("ArrowRight")
        browser.wait("document.querySelector('.teacher .place').textContent.includes('of 8')")
        browser.wait(DONE)
        tab_to(browser, "id === 'go'")
        browser.press("Enter")
        browser.wait(f"!{DONE}")
        browser.wait(DONE)
        tab_to(browser, "matches('.student .scrub input')")
        browser.press("End")
        for side in ("student", "teacher"):  # both move along the walk together
            place = browser.ask(f"document.querySelector('.{side} .place').textContent")
            assert place == "Picture 8 of 8"
        for side in ("student", "teacher"):
            lines = browser.ask(f"document.querySelector('.{side} .python code').textContent")
            assert saved(browser, side) == png(grid(run(lines)))
        tab_to(browser, "matches('.student summary')")
        browser.press("Enter")
        assert browser.ask("document.querySelector('.student details').open")
        name = browser.ask("document.querySelector('.teacher .save a').download")
        assert name == "teacher-walk-0.png"

        browser.ask("document.getElementById('seed').focus()")
        browser.ask("document.getElementById('seed').select()")
        browser.type("1")
        browser.wait("document.getElementById('error').textContent.includes('two that differ')")
        assert browser.ask("document.getElementById('error').getAttribute('role')") == "alert"
        wrong = [fault for fault in browser.faults() if "status of 400" not in fault]
        assert wrong == []
        away = [url for url in browser.requests() if url.partition(":")[0] != "data"]
        assert all(url.startswith(f"http://127.0.0.1:{served.door.port}/") for url in away)
        assert len(away) >= 7

        assert served.stop() == (0, "this address is for this machine alone; Ctrl-C stops it\n")
        browser.ask("document.getElementById('go').click()")
        browser.wait("document.getElementById('error').textContent.includes('does not answer')")


def test_hostile_requests(finished: Path) -> None:
    """Five hundred: none is an error of the server, none shows a file, and it works on."""
    with Served(finished, "runs/sid") as served:
        found: Counter[int] = Counter()
        for number in range(500):
            answer = ask(served.door, hostile(number, served.door))
            found[answer.status] += 1
            assert answer.status < 500, (number, answer)
            for inside in (b"Traceback", b"root:", b"compare_digest", b"[core]"):
                assert inside not in answer.body, number
        assert len(found) >= 6, found
        assert found[200] > 20
        began = time.monotonic()
        last: Any = ask(served.door, normal(served.door, 3), stays=20)
        assert last.status == 200
        assert b'{"event":"end"}' in last.body
        assert time.monotonic() - began < 20
        code, err = served.stop()
        assert code == 0
        assert "Error" not in err, err
