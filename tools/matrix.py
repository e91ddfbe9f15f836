"""Run every test that the fault matrix names, and count: python tools/matrix.py

The table of docs/reliability.md names tests by row. They are run once, with pytest, and what came
of each row is printed as a line: how many cases passed of how many. The exit status is 1 if one
did not pass, or a row names a test that was not found.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"


def rows() -> dict[str, list[str]]:
    """Row of the table -> the tests it names, as "file::name" or "name"."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        match = re.match(r"\| ([\d, ]+) \|", line)
        if match:
            found[match[1]] = re.findall(r"`((?:\w+::)?test_\w+)`", line)
    return found


def places(name: str) -> list[str]:
    """Where a test is, as pytest wants it; of those in several files, in the named one."""
    file, _, test = name.rpartition("::")
    paths = sorted((ROOT / "tests").rglob(f"{file or 'test_*'}.py"))
    return [f"{path}::{test}" for path in paths if f"def {test}(" in path.read_text("utf-8")]


def main() -> None:
    table = rows()
    wanted = [place for names in table.values() for name in names for place in places(name)]
    with tempfile.TemporaryDirectory() as home:
        report = Path(home) / "report.xml"
        command = ["-m", "pytest", "-q", f"--junitxml={report}", *dict.fromkeys(wanted)]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
        passed, every = Counter[str](), Counter[str]()
        for case in ElementTree.parse(report).iter("testcase"):
            file = case.attrib["classname"].rpartition(".")[2]
            name = case.attrib["name"].partition("[")[0]
            for key in (name, f"{file}::{name}"):
                every[key] += 1
                passed[key] += len(case) == 0
    good = True
    for row, names in table.items():
        good &= all(every[name] and passed[name] == every[name] for name in names)
        done = " + ".join(str(passed[name]) for name in names) or "no test"
        print(f"{row:>7}: {done} of {sum(every[name] for name in names)} cases passed")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
