"""The quick part of `make drill`: ten deaths, every part of the state forgotten, fifty damages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    assert told["kills"]["inside a save"] >= 2
    assert told["kills"]["runs"] == told["kills"]["equal to the undisturbed run"] >= 2
    noticed = told["forgetting is noticed"]
    assert [name for name, differs in noticed.items() if not differs] == ["nothing"]
    assert len(noticed) >= 9
    assert told["damage"]["detected"] == told["damage"]["corruptions"] == 50
    assert min(told["damage"][kind] for kind in ("flip", "cut", "zero")) > 5
