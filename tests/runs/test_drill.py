"""The quick part of `make drill`: ten deaths, every part of the state forgotten, fifty damages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_drill_in_small(tmp_path: Path) -> None:
    """The tool's own exit status, and that it did what it says."""
    small = ("--kills", "10", "--corruptions", "50", "--out", str(tmp_path / "drill"))
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "drill.py"), *small], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    told = json.loads(run.stdout)
    assert told["kills"]["kills"] == 10
    moment, save = told["kills"]["at any moment"], told["kills"]["inside a save"]
    assert moment["kills"] + save["kills"] == 10
    assert moment["continued"] + save["continued"] == 10
    assert save["kills"] >= 2
    assert told["kills"]["runs"] == told["kills"]["equal to the undisturbed run"] >= 2
    noticed = told["forgetting is noticed"]
    assert [name for name, differs in noticed.items() if not differs] == ["nothing"]
    assert told["of them noticed"] == told["forgotten parts"] == len(noticed) - 1 >= 9
    assert told["damage"]["detected"] == told["damage"]["corruptions"] == 50
    assert min(told["damage"][kind] for kind in ("flip", "cut", "zero")) > 5


def test_every_test_that_the_page_names_exists() -> None:
    """docs/reliability.md is a table of tests."""
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    known = {name for text in sources for name in re.findall(r"^def (test_\w+)", text, re.M)}
    assert len(named) > 30
    assert named <= known
