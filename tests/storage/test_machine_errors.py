"""Trouble of the machine, signals at any moment, and names and terminals that are not UTF-8."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.signals import Stopped, interruptible, tolerant
from fewstep.storage.machine_errors import ADVICE, sentence, short_of_memory, trouble
from tests.command import SMALL, TEACH, fewstep

ROOT = Path(__file__).parents[2]
WRITING: dict[str, tuple[str, ...]] = {
    "train": (*TEACH[:2], *SMALL, "--steps", "2", "--out", "new"),
    "sample": ("sample", "x", "--seeds", "0-3"),
    "arrays": ("sample", "x", "--seeds", "0-3", "--out", "a.npz"),
    "evaluate": ("evaluate", "x", "--samples", "100", "--draws", "1"),
    "report": ("report", "x"),
    "export": ("export", "x", "x.pt2", "--to", "pt2"),
}


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: Any) -> Path:
    """A finished run, x."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs" / "sid", "x")
    return Path("x")


def command(*args: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """fewstep in a process of its own."""
    told = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    words = [sys.executable, "-m", "fewstep", *args]
    return subprocess.run(words, capture_output=True, env=told, check=False)


@pytest.mark.parametrize("verb", WRITING)
@pytest.mark.usefixtures("run")
def test_a_full_disk_is_trouble_of_the_machine(verb: str, monkeypatch: Any) -> None:
    """Code 1 and what to do, whatever is being written; what was there is as before."""
    before = {p: p.read_bytes() for p in Path("x").rglob("*") if p.is_file()}

    def failing(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", failing)
    code, out, err = fewstep(*WRITING[verb])
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("fewstep: ")
    assert ": No space left on device; free some space, or choose a folder on another" in last
    assert last.endswith(", then run the same command again: what was saved is kept")
    assert {p: p.read_bytes() for p in before} == before
    assert not [p for p in Path().iterdir() if p.name not in ("x", "new")]


@pytest.mark.parametrize("number", ADVICE)
def test_trouble_is_told_from_wrong_input(number: int, tmp_path: Path, monkeypatch: Any) -> None:
    """By the system's number, in Python's words or in those of another language's library."""
    monkeypatch.chdir(tmp_path)
    raised: list[Exception] = [
        OSError(number, os.strerror(number), "a.png"),
        RuntimeError(f"Error while serializing: I/O error: x (os error {number})"),
    ]
    for error in raised:

        def failing(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("fewstep.cli.recipes.run", failing)
        code, out, err = fewstep("recipes")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert f"{os.strerror(number)}; {ADVICE[number]}, then run" in err
    for wrong in (errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.EROFS):
        assert trouble(OSError(wrong, "x")) is None
        assert sentence(OSError(wrong, "Nothing", "a.png")) == "a.png: Nothing"
    for other in (ValueError("error 28"), RuntimeError("(os error 2)"), KeyError(28)):
        assert trouble(other) is None


def test_memory_that_does_not_suffice_is_told(monkeypatch: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    for error in (caught.value, MemoryError(), np.exceptions.DTypePromotionError("no")):
        assert short_of_memory(error) is (error is not None and str(error) != "no")

    def failing(*_: object) -> None:
        raise caught.value

    monkeypatch.setattr("fewstep.cli.recipes.run", failing)
    said = "fewstep: the memory does not suffice; ask for less at once, or close other programs\n"
    assert fewstep("recipes") == (1, "", said)


def test_other_errors_are_not_hidden(monkeypatch: Any) -> None:
    """The control: a defect of the program stays a traceback."""

    def failing(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("fewstep.cli.recipes.run", failing)
    with pytest.raises(RuntimeError, match="a defect"):
        fewstep("recipes")


@pytest.mark.slow
def test_an_export_to_a_file_that_cannot_grow(run: Path) -> None:
    """torch ends a process that writes a program where it does not fit; the kernel's own limit."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    words = [sys.executable, "-m", "fewstep", *WRITING["export"]]
    told = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, env=told, check=False, preexec_fn=few)
    assert done.returncode == 1
    assert b": File too large; raise the limit on the size of files" in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert sorted(p.name for p in Path().iterdir()) == ["x"]


def test_output_that_goes_nowhere() -> None:
    with Path("/dev/full").open("w") as full:
        told = {**os.environ, "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-m", "fewstep", "--help"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, env=told, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"fewstep: No space left on device; ")
    assert done.stderr.count(b"\n") == 1


KILLER = """
import os, sys, threading, time
def wait():
    while {module!r} not in sys.modules:
        time.sleep(0.001)
    os.kill(os.getpid(), {number})
threading.Thread(target=wait, daemon=True).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "number", "code", "name"),
    [
        ("fewstep.cli.sample", signal.SIGTERM, 143, " by SIGTERM"),
        ("torch", signal.SIGINT, 130, ""),
        pytest.param("torch.nn", signal.SIGTERM, 143, " by SIGTERM", marks=pytest.mark.slow),
        ("fewstep.diffusion.types", signal.SIGHUP, 129, " by SIGHUP"),
        ("numpy._core", signal.SIGTERM, 143, " by SIGTERM"),
        pytest.param("fewstep.cli", signal.SIGINT, 130, "", marks=pytest.mark.slow),
        ("fewstep.cli.parser", signal.SIGTERM, 143, " by SIGTERM"),
    ],
)
def test_a_signal_while_modules_are_imported(
    module: str, number: int, code: int, name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Before any work has begun: the usual code and one line."""
    monkeypatch.chdir(tmp_path)
    text = KILLER.format(module=module, number=int(number))
    (tmp_path / "sitecustomize.py").write_text(text)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = command("sample", ".", PYTHONPATH=path)
    said = f"\nfewstep: stopped{name}; run the same command again to continue\n"
    assert (done.returncode, done.stdout, done.stderr.decode()) == (code, b"", said)


def test_signals_are_put_back_and_left_alone() -> None:
    """Handlers of the caller return; what is ignored, as under nohup, stays ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(n) for n in numbers]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with interruptible():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Stopped) as caught:
                signal.raise_signal(signal.SIGTERM)
        assert caught.value.number == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before[2])
    assert [signal.getsignal(n) for n in numbers] == before
    done = []
    thread = threading.Thread(target=lambda: done.append(fewstep("--version").code))
    thread.start()
    thread.join()
    assert done == [0]


ODD = os.fsdecode(b"r\xe9n \xff")


@pytest.mark.slow
def test_names_that_are_not_utf_8(run: Path) -> None:
    """A run folder, a teacher and outputs of such names: all verbs, to the end."""
    run.rename(ODD)
    for args in (
        ("inspect", ODD),
        ("sample", ODD, "--seeds", "0-3", "--out", f"{ODD}.png"),
        ("sample", ODD, "--seeds", "0-3", "--out", f"{ODD}.npz"),
        ("evaluate", ODD, "--samples", "100", "--draws", "1"),
        ("report", ODD),
        ("export", ODD, f"{ODD}.pt2", "--to", "pt2"),
    ):
        done = fewstep(*args)
        assert done.code == 0, (args[0], done.err)
    assert torch.export.load(io.BytesIO(Path(f"{ODD}.pt2").read_bytes())).module() is not None
    flags = ("--steps", "2", "--out", f"{ODD} 2")
    assert fewstep(*TEACH[:2], *SMALL, *flags).code == 0
    small = (*SMALL, "--steps", "2", "--teacher", f"{ODD} 2", "--out", f"{ODD} 3")
    assert fewstep("distill", "digits", *small).code == 0
    assert fewstep("report", f"{ODD} 3").code == 0
    page = Path(f"{ODD} 3", "report.html").read_text(encoding="utf-8")
    assert r"r\udce9n \udcff" in page  # readable, as an escape


EURO = os.fsdecode(b"\xff \xe2\x82\xac \xc3\xa9")
"""A byte that is no letter, a euro, an e with an accent."""
WRITTEN = {
    "ascii": b"\xff \\u20ac \\xe9\n",
    "latin-1": b"\xff \\u20ac \xe9\n",
    "utf-8": os.fsencode(EURO) + b"\n",
}


@pytest.mark.parametrize(("encoding", "data"), WRITTEN.items(), ids=WRITTEN)
def test_terminals_of_any_encoding(encoding: str, data: bytes, monkeypatch: Any) -> None:
    """What has no letter is escaped; a path comes out as the bytes that it is."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding))
        with pytest.raises(UnicodeEncodeError):
            print(EURO + "\ud83d", file=getattr(sys, name))
        tolerant()
        print(EURO, file=getattr(sys, name), flush=True)
        assert getattr(sys, name).buffer.getvalue() == data


def test_a_terminal_of_ascii(run: Path) -> None:
    """The same of a whole command in a process of its own, where a locale is missing too."""
    out = f"{EURO}.png"
    done = command("sample", "x", "--out", out, PYTHONIOENCODING="ascii", LC_ALL="C")
    expected = WRITTEN["ascii"].replace(b"\n", b".png\n")
    assert (done.returncode, done.stdout) == (0, expected)
    assert done.stderr == b"making pictures: 64/64\n"
    assert Path(out).is_file()
