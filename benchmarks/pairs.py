"""100,000 samples of a teacher made, killed and made on: python benchmarks/pairs.py [--count N]

`PairRegression` on the digits twice: undisturbed, and by a process that gets SIGKILL, five times
while it makes pairs and twice while it trains. Both runs then have to hold the same bits: every
file of pairs, and the student. At last one bit of one pair is turned, and the run has to be
refused. What is told, into results/pairs.json: CPU seconds and bytes of the pairs, how much the
kills cost, and whether all is equal.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fewstep.runs.environment import environment
from fewstep.storage.files import digest, write_json

OUT = Path(__file__).parent / "results" / "pairs.json"
KILLS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of the pairs, made which the process is killed."""
STEPS, EVERY, LATE = 300, 50, (120, 230)
"""Of training: all steps, between checkpoints, and those at which it is killed."""


def cpu() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the tensors in a folder, by path."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): digest(file) for file in files}


def parts(run: Path) -> int:
    """Finished files of pairs."""
    return len(list(run.glob("pairs/part-*/manifest.json")))


def lines(run: Path) -> int:
    """Steps in the log."""
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def command(teacher: Path, out: Path, count: int) -> list[str]:
    """The run."""
    method = f"PairRegression(pairs=Pairs({count}))"
    told = ["--teacher", str(teacher), "--out", str(out), "--method", method]
    steps = ["--steps", str(STEPS), "--save-every", str(EVERY), "--sample-every", str(STEPS)]
    return [sys.executable, "-m", "fewstep", "distill", "digits", *told, *steps]


def killed(asked: list[str], run: Path, done: Any, until: int) -> bool:
    """Run until `done(run)` is `until`, then SIGKILL; whether the process was still there."""
    process = subprocess.Popen(asked, stderr=subprocess.DEVNULL)
    while process.poll() is None and done(run) < until:
        time.sleep(0.01)
    alive = process.poll() is None
    if alive:
        process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def refused(asked: list[str], run: Path) -> str:
    """The sentence after one bit of a pair was turned and the student taken away."""
    file = sorted(run.glob("pairs/part-*/x0.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for path in (run / "student").iterdir():
        path.unlink()
    (run / "student").rmdir()
    ended = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended
    return ended.stderr.strip().splitlines()[-1]


def measure(count: int, home: Path) -> dict[str, Any]:
    """All of it, in the folder `home`."""
    teach = [sys.executable, "-m", "fewstep", "train", "digits_teacher", "--out"]
    subprocess.run([*teach, str(home / "t")], check=True)
    calm, wild = home / "calm", home / "wild"
    asked = command(home / "t", calm, count)
    before = cpu()
    subprocess.run(asked, check=True)
    whole = cpu() - before
    asked = command(home / "t", wild, count)
    number, kills, before = parts(calm), 0, cpu()
    for share in KILLS:
        kills += killed(asked, wild, parts, int(share * number))
    for step in LATE:
        kills += killed(asked, wild, lines, step)
    subprocess.run(asked, check=True)
    disturbed = cpu() - before
    pairs = digests(calm / "pairs")
    same = ("different", "equal")
    equal = {
        "pairs": same[pairs == digests(wild / "pairs")],
        "student": same[digests(calm / "student") == digests(wild / "student")],
    }
    size = sum(file.stat().st_size for file in (calm / "pairs").rglob("*.safetensors"))
    return {
        "count": count,
        "files": len(pairs),
        "megabytes": size / 1e6,
        "kills": kills,
        "equal": equal,
        "cpu_seconds": {"calm": whole, "disturbed": disturbed, "lost": disturbed - whole},
        "refused": refused(asked, wild).replace(str(home) + os.sep, ""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as home:
        found = measure(count, Path(home))
    write_json(OUT, {**found, "machine": environment()})
    print(found)


if __name__ == "__main__":
    main()
