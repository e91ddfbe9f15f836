"""Plant one-line faults in the package and see that the tests catch each: python tools/mutants.py

A test-suite is worth what it refuses. Every entry of tools/mutants.json names a file of the
package, tests, and pairs: a fragment that is in the file once, and what replaces it, after which
the tests must fail. The package and its tests are copied; the working tree is never touched. The
same tests must first pass without a fault.

Exit status 1 if a fault survives, if its original is not found exactly once, or if the tests
end in anything but failure (a fault that cannot even be imported proves nothing).

    python tools/mutants.py                all of them
    python tools/mutants.py losses path    those whose file's name contains one of these words
"""

from __future__ import annotations

import compileall
import json
import multiprocessing
import os
import py_compile
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2
LIMIT = 300
"""Seconds one run of tests may take."""
PASSED, FAILED, HUNG = 0, 1, -1
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch", "pytest", "PIL.Image"])


class Mutant(NamedTuple):
    """`original`, found once in fewstep/`file`, becomes `replacement`; tests/`tests` must fail."""

    file: str
    original: str
    replacement: str
    tests: tuple[str, ...]


def listed() -> list[Mutant]:
    """All faults of tools/mutants.json."""
    groups = json.loads((ROOT / "tools" / "mutants.json").read_text(encoding="utf-8"))
    return [
        Mutant(group["file"], original, replacement, tuple(group["tests"]))
        for group in groups
        for original, replacement in group["faults"]
    ]


def copy_to(folder: Path) -> Path:
    """A copy of all that tests need, compiled once.

    Bytecode is compared with its source by a hash, since a fault can keep a file's size and time.
    """
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("fewstep", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    by_hash = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(folder / "fewstep", quiet=1, invalidation_mode=by_hash)
    return folder


def run_tests(folder: Path, tests: tuple[str, ...]) -> int:
    """pytest's exit status, in a process that is forked from one that has imported torch."""
    done = FORKED.Process(target=_pytest, args=(folder, [f"tests/{name}" for name in tests]))
    done.start()
    done.join(LIMIT)
    if done.is_alive():
        os.killpg(done.pid or 0, signal.SIGKILL)
        done.join()
        return HUNG
    return done.exitcode or 0


def _pytest(folder: Path, paths: list[str]) -> None:
    """Silent; bytecode of tests, which stay as they are, is kept for the next run."""
    os.setpgrp()  # what tests start ends with them
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = False
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    import pytest

    raise SystemExit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *paths]))


def misquoted(mutant: Mutant) -> bool:
    """Whether the original is not in its file exactly once."""
    return (ROOT / "fewstep" / mutant.file).read_text().count(mutant.original) != 1


def verdict(mutant: Mutant, folder: Path) -> str:
    """Apply one fault in `folder`, test, and restore."""
    file = folder / "fewstep" / mutant.file
    sound = file.read_text()
    file.write_text(sound.replace(mutant.original, mutant.replacement))
    try:
        status = run_tests(folder, mutant.tests)
    finally:
        file.write_text(sound)
    names = {FAILED: "caught", PASSED: "SURVIVED", HUNG: "HUNG"}
    return names.get(status, f"BROKEN (pytest exit {status})")


def main(words: list[str]) -> int:
    """Run the chosen faults, WORKERS at a time; the exit status."""
    chosen = [m for m in listed() if not words or any(word in m.file for word in words)]
    wrong = [m for m in chosen if misquoted(m)]
    for m in wrong:
        print(f"NOT FOUND ONCE  {m.file}: {m.original}")
    if wrong or not chosen:
        return 1
    start, failures = time.time(), 0
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        copies: Queue[Path] = Queue()
        for k in range(WORKERS):
            copies.put(copy_to(Path(name) / str(k)))

        def job(mutant: Mutant) -> tuple[Mutant, str]:
            folder = copies.get()
            try:
                return mutant, verdict(mutant, folder)
            finally:
                copies.put(folder)

        def passes(tests: tuple[str, ...]) -> bool:
            folder = copies.get()
            try:
                return run_tests(folder, tests) == PASSED
            finally:
                copies.put(folder)

        with ThreadPoolExecutor(WORKERS) as pool:
            different = sorted({m.tests for m in chosen})
            good = pool.map(passes, different)
            sick = [tests for tests, ok in zip(different, good, strict=True) if not ok]
        if sick:
            print(f"these do not pass without any fault: {sick}")
            return 1
        print(f"tests pass without faults ({time.time() - start:.0f} s)", flush=True)
        with ThreadPoolExecutor(WORKERS) as pool:
            for mutant, result in pool.map(job, chosen):
                failures += result != "caught"
                change = f"{mutant.original.strip()}  ->  {mutant.replacement.strip()}"
                print(f"{result:9} {mutant.file}: {change}", flush=True)
    caught = len(chosen) - failures
    print(f"{caught} of {len(chosen)} caught in {time.time() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
