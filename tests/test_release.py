"""What is published: wheel and sdist hold what they should, and the wheel works by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest

import fewstep
from tests.command import DISTIL, TEACH

ROOT = Path(__file__).parent.parent
NAME = f"fewstep-{fewstep.__version__}"
INFO = f"{NAME}.dist-info"
RECORDS = {f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
PLAIN = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def run(*args: str | Path, folder: Path, **env: str) -> str:
    """What a program prints; it has to end well."""
    done = subprocess.run(
        [str(arg) for arg in args],
        cwd=folder,
        env={**os.environ, **PLAIN, **env},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"
    return done.stdout


class Built(NamedTuple):
    """The two files of a release."""

    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, and the wheel that is made of it, by the build backend that is installed."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, folder=out)
    return Built(out / f"{NAME}-py3-none-any.whl", out / f"{NAME}.tar.gz")


def repository() -> dict[str, bytes]:
    """Name -> content of every file that is under version control, or about to be."""
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs into a release is what git knows, and this is no checkout")
    kinds = ("--cached", "--others", "--exclude-standard")
    listed = run("git", "ls-files", "-z", *kinds, folder=ROOT)
    names = [name for name in listed.split("\0") if name]
    return {name: (ROOT / name).read_bytes() for name in names if (ROOT / name).is_file()}


def unpacked(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def unlike(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> list[str]:
    """Names that one side alone has, and those whose contents differ."""
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


@pytest.mark.slow
def test_the_wheel_is_the_package_and_the_licence(built: Built) -> None:
    """Byte for byte, with assets, pages and type information, and nothing else."""
    expected = {k: v for k, v in repository().items() if k.startswith("fewstep/")}
    assert expected["fewstep/py.typed"] == b""
    assert len(expected["fewstep/eval/assets/digits_features.safetensors"]) > 10_000
    expected[f"{INFO}/licenses/LICENSE"] = (ROOT / "LICENSE").read_bytes()
    found = unpacked(built.wheel)
    assert found.keys() >= RECORDS
    content = {name: data for name, data in found.items() if name not in RECORDS}
    assert unlike(content, expected) == []
    planted = {**content, "tests/test_release.py": b"", "fewstep/py.typed": b"no"}
    del planted["fewstep/recipes/choices.json"]
    assert unlike(planted, expected) == [
        *("fewstep/py.typed", "fewstep/recipes/choices.json", "tests/test_release.py"),
    ]


@pytest.mark.slow
def test_the_sdist_is_the_repository(built: Built) -> None:
    """So whoever has it runs the tests, too; only the metadata is added."""
    with tarfile.open(built.sdist) as archive:
        files = [member for member in archive if member.isfile()]
        found = {m.name.removeprefix(f"{NAME}/"): archive.extractfile(m) for m in files}
        content = {name: file.read() for name, file in found.items() if file is not None}
    assert content.pop("PKG-INFO") == unpacked(built.wheel)[f"{INFO}/METADATA"]
    assert unlike(content, repository()) == []


@pytest.mark.slow
def test_the_metadata_says_what_is_so(built: Built) -> None:
    """Name, version, licence, command, the README; every extra that a sentence names is there."""
    found = unpacked(built.wheel)
    about: Message = message_from_bytes(found[f"{INFO}/METADATA"])
    assert (about["Name"], about["Version"]) == ("fewstep", fewstep.__version__)
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in about.get_all("Classifier", [])
    assert about["Description-Content-Type"] == "text/markdown"
    text = about.get_payload(decode=True)
    assert isinstance(text, bytes)
    assert text.decode().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert found[f"{INFO}/entry_points.txt"].decode().split() == [
        *("[console_scripts]", "fewstep", "=", "fewstep.__main__:main"),
    ]
    sources = [p for folder in ("fewstep", "docs") for p in (ROOT / folder).rglob("*.[pm][yd]")]
    texts = [path.read_text(encoding="utf-8") for path in (*sources, ROOT / "README.md")]
    extras = {name for text in texts for name in re.findall(r"fewstep\[([\w,]+)\]", text)}
    assert {"t2i", "onnx", "lowmem"} <= extras <= set(about.get_all("Provides-Extra", []))
    run(sys.executable, "-m", "twine", "check", "--strict", *built, folder=built.wheel.parent)


@pytest.mark.slow
def test_the_wheel_alone_does_what_the_checkout_does(
    built: Built, finished: Path, tmp_path: Path
) -> None:
    """Teacher, student, scores and report in an empty folder; the same weights, to the bit."""
    place, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--no-compile", "--target", place, built.wheel, folder=empty)
    assert (place / "bin" / "fewstep").is_file()

    def command(*args: str) -> str:
        return run(sys.executable, "-m", "fewstep", *args, folder=empty, PYTHONPATH=str(place))

    where = "import fewstep; print(fewstep.__file__)"
    printed = run(sys.executable, "-c", where, folder=empty, PYTHONPATH=str(place))
    assert Path(printed.strip()) == place / "fewstep" / "__init__.py"
    assert "Train a teacher on 8x8 digits" in " ".join(command("demo", "--help").split())
    assert "digits_teacher" in command("recipes")
    command(*TEACH, "--out", "runs/teacher")
    command(*DISTIL, "--teacher", "runs/teacher", "--out", "runs/sid")
    for name in ("teacher", "sid"):
        weights = Path("runs") / name / "student" / "model.safetensors"
        assert (empty / weights).read_bytes() == (finished / weights).read_bytes()
    command("evaluate", "runs/sid", "--samples", "100", "--draws", "1")
    command("report", "runs/sid")
    assert "fd_digits" in (empty / "runs/sid/metrics.json").read_text(encoding="utf-8")
    assert "</html>" in (empty / "runs/sid/report.html").read_text(encoding="utf-8")


def test_the_changelog_has_versions() -> None:
    """Headings are `Unreleased`, then versions with their day, newest first, none yet to come."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## (.*)$", text, re.M)
    assert versions(heads) == sorted(set(versions(heads)), reverse=True)
    assert versions(heads)[:1] <= versions([f"{fewstep.__version__} - 2026-12-01"])
    assert versions(["Unreleased", "0.2.0 - 2026-12-01"]) == [(0, 2, 0)]
    for wrong in ("0.2.0", "0.2 - 2026-12-01", "Unreleased"):
        with pytest.raises(AssertionError):
            versions(["0.3.0 - 2026-12-02", wrong])


def versions(heads: list[str]) -> list[tuple[int, ...]]:
    """The versions of a changelog's headings; the first may be `Unreleased`."""
    found = []
    for head in heads[heads[:1] == ["Unreleased"] :]:
        match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+) - \d{4}-\d\d-\d\d", head)
        assert match, f"{head!r} is no version with its day"
        found.append(tuple(map(int, match.groups())))
    return found
