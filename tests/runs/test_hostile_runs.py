"""The small files of a finished run, edited or odd: every verb answers in a sentence, or works."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fewstep.storage.bounded_reading import DEEPEST, json_value
from fewstep.storage.files import Damaged, read_json, read_lines
from tests.command import Result, fewstep

VERBS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "x"),
    "sample": ("sample", "x", "--seeds", "0-3"),
    "report": ("report", "x"),
    "evaluate": ("evaluate", "x", "--samples", "100", "--draws", "1"),
    "export": ("export", "x", "x.pt2", "--to", "pt2"),
}
FILES = (
    *("run.json", "metrics.json", "log.jsonl", "gauges.jsonl", "evaluation/own-10.json"),
    *("student/model.json", "student/manifest.json", "best/model.json"),
)


def deep(levels: int) -> bytes:
    return b'{"a": ' * levels + b"1" + b"}" * levels


def doubled(data: bytes) -> bytes:
    """Its first key twice."""
    text = data.decode()
    key = text.split('"')[1]
    return text.replace("{", f'{{"{key}": 1, ', 1).encode()


WHOLE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "not UTF-8": lambda data: b'{"a": "\xff\xfe"}\n',
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "a list": lambda data: b"[]\n",
    "null": lambda data: b"null\n",
    "a number": lambda data: b"1e400\n",
    "NaN": lambda data: b"NaN\n",
    "no keys": lambda data: b"{}\n",
    "deep": lambda data: deep(100_000) + b"\n",
    "deep lists": lambda data: b"[" * 100_000 + b"\n",
    "rather deep": lambda data: deep(900) + b"\n",
    "a key twice": doubled,
    "400 digits": lambda data: b'{"step": ' + b"9" * 400 + b"}\n",
    "5000 digits": lambda data: b'{"step": ' + b"9" * 5000 + b"}\n",
    "huge": lambda data: b'{"step": "' + b"x" * (17 << 20) + b'"}\n',
}
RAW = "@raw@"
"""Marks text that json.dumps would not write."""
VALUES: dict[str, Any] = {
    **{text: RAW + text for text in ("1e400", "-1e400", "NaN", "-Infinity", "1e-400")},
    "400 digits": RAW + "9" * 400,
    "5000 digits": RAW + "9" * 5000,
    "deep": RAW + "[" * 100_000 + "]" * 100_000,
    **{f"{value!r:.20}": value for value in (10**30, -(10**9), 2**62, -1, 0, 0.5, True, None)},
    **{
        f"{value!r:.20}": value for value in ("", "x", "inf", "nan", "\ud800", "\0", "x" * 100_000)
    },
    **{f"{value!r:.20}": value for value in ([], {}, [1, "x"], {"x": [None]}, {"type": "SiD"})},
}
MISSING = object()


def text_of(value: Any) -> bytes:
    """JSON in which marked texts stand as they are."""
    text = json.dumps(value)
    for raw in VALUES.values():
        if isinstance(raw, str) and raw.startswith(RAW):
            text = text.replace(f'"{raw}"', raw.removeprefix(RAW))
    return text.encode() + b"\n"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a JSON value has values, itself left out."""
    keys = (
        value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    )
    for key in keys:
        yield (*path, key)
        yield from places(value[key], (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at `path`, or without it."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if new is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return copy


def sign(folder: Path, sign_self: bool = True) -> None:
    """Give the manifest of `folder` the digests of its files as they are now."""
    facts = json.loads((folder / "manifest.json").read_text())
    facts.pop("self")
    for name in facts["sha256"]:
        facts["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    own = hashlib.sha256(json.dumps(facts, indent=2).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**facts, "self": own}, indent=2) + "\n")


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: Any) -> Path:
    """A finished run in x, with everything that a run folder can hold."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs", "runs")
    shutil.move("runs/sid", "x")
    shutil.copytree("x/student", "x/best")
    scores = {"fd_digits": 1.0, "fd_digits_std": 0.1, "nn": 2.0, "calls": 1.0, "draws": 1}
    stored: dict[str, Any] = dict.fromkeys(("real", "teacher", "student"), scores)
    stored["protocol"] = {"samples": 100, "draws": 1, "distance": "fd_digits"}
    Path("x/metrics.json").write_text(json.dumps(stored))
    score = {"FD(own, 10)": 1.5}
    told = {"features": "own", "samples": 10, "labels": "none", "guidance": 1.0, "model": "0"}
    told |= {"reference": {"file": "r.npz", "sha256": "0", "pictures": 10}, "diversity": 0.5}
    told |= {"runs": [score], "best": score, "mean": score, "std": score, "best run": 0}
    Path("x/evaluation").mkdir()
    Path("x/evaluation/own-10.json").write_text(json.dumps(told))
    return Path("x")


def answers(verb: str, where: str) -> Result:
    """What a verb says of x: never a traceback, and one sentence where it refuses."""
    Path("x.pt2").unlink(missing_ok=True)
    Path("x.pt2.md").unlink(missing_ok=True)
    try:
        result = fewstep(*VERBS[verb])
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})"
        raise AssertionError(f"{verb} of {where}: {what}") from error
    assert result.code in (0, 2), (verb, where, result)
    if result.code:
        last = result.err.splitlines()[-1]
        assert last.startswith("fewstep: "), (verb, where, last[:300])
        assert len(last) < 1000, (verb, where, last[:1000])
        assert "Traceback" not in result.err
    return result


def fuzz(run: Path, verbs: tuple[str, ...], cases: Iterator[tuple[str, str, bytes]]) -> int:
    """Try the verbs on each case (file, name, new content); how many were refused."""
    refused, wrong = 0, []
    for name, what, data in cases:
        path, sound = run / name, (run / name).read_bytes()
        manifest = path.with_name("manifest.json")
        signed = manifest.read_bytes() if manifest.exists() else b""
        path.write_bytes(data)
        if path.name == "model.json":
            sign(path.parent)  # so that what it says is read
        for verb in verbs:
            try:
                refused += answers(verb, f"{name}: {what}").code == 2
            except AssertionError as error:
                wrong.append(str(error)[:400])
        if signed:
            manifest.write_bytes(signed)
        path.write_bytes(sound)
    assert wrong == []
    return refused


def edits(run: Path, rng: random.Random) -> Iterator[tuple[str, str, bytes]]:
    """One value of one file is another, or missing: every place once, each with some value."""
    values = [*VALUES.items(), ("missing", MISSING)]
    for name in FILES:
        if name.endswith("manifest.json"):
            continue
        text = (run / name).read_text()
        told = json.loads(text.splitlines()[-1] if name.endswith("l") else text)
        before = "".join(text.splitlines(keepends=True)[:-1]) if name.endswith("l") else ""
        for path in places(told):
            what, new = rng.choice(values)
            data = before.encode() + text_of(changed(told, path, new))
            yield name, f"{'.'.join(map(str, path))} = {what}", data


@pytest.mark.parametrize("file", FILES)
def test_whatever_a_small_file_holds_is_answered(file: str, run: Path) -> None:
    """By the verbs that are quick; nothing but a whole file's content is tried."""
    cases = ((file, what, change((run / file).read_bytes())) for what, change in WHOLE.items())
    refused = fuzz(run, ("inspect", "sample"), cases)
    # without a sound manifest the run is one that has not ended, which inspect tells
    read = {"run.json": 1, "student/model.json": 2, "student/manifest.json": 1}
    assert refused >= read.get(file, 0) * (len(WHOLE) - 2)


@pytest.mark.slow
def test_some_values_of_every_file(run: Path) -> None:
    """Many by the verbs that are quick, few by the one that reads most; more in a slow test."""
    rng = random.Random(0)
    cases = list(edits(run, rng))
    assert 0 < fuzz(run, ("inspect", "sample"), iter(rng.sample(cases, 30))) < 30
    small = [case for case in cases if not case[0].startswith("best")]
    assert 0 < fuzz(run, ("report",), iter(rng.sample(small, 8))) < 8


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_every_value_of_every_file(verb: str, run: Path) -> None:
    """Each place of each file with some value, each file with every content; of slow verbs few."""
    cases = [(f, w, c((run / f).read_bytes())) for f in FILES for w, c in WHOLE.items()]
    cases += edits(run, random.Random(1))
    quick = verb in ("inspect", "sample")
    fuzz(run, (verb,), iter(cases if quick else random.Random(2).sample(cases, 30)))


def test_the_runs_own_answers_are_unchanged(run: Path) -> None:
    """The control: what is not edited is read by all verbs."""
    assert [answers(verb, "nothing").code for verb in VERBS] == [0] * len(VERBS)


SHOULD = {
    b'{"a": 1, "a": 2}': "the key 'a' is there twice",
    b'{"b": {"a": 1, "a": 1}}': "the key 'a' is there twice",
    b"[1e400]": "the number 1e400 is not finite, or too long",
    b"[-1e400]": "the number -1e400 is not finite, or too long",
    b"[NaN]": "the number NaN is not finite, or too long",
    b"[Infinity]": "the number Infinity is not finite, or too long",
    b"1" * 65: "the number 11111111111111111111 is not finite, or too long",
    b"0." + b"1" * 65: "the number 0.111111111111111111 is not finite, or too long",
    b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1): "it is nested more than 64 levels deep",
    deep(DEEPEST + 1): "it is nested more than 64 levels deep",
    b"[" * 200_000: "it is nested more than 64 levels deep",
}


@pytest.mark.parametrize(("data", "sentence"), SHOULD.items(), ids=itertools.count())
def test_the_reader_refuses(data: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        json_value(data, finite=True)


def test_the_reader_reads_what_is_within_its_bounds(tmp_path: Path) -> None:
    most = b"[" * DEEPEST + b"]" * DEEPEST
    assert json_value(most) == json.loads(most)
    assert json_value(b"1" * 64) == int("1" * 64)
    value = {"a": [1.5e-300, -0.0, True, None, "\u00e9"], "b": {"a": 10**30}}
    assert json_value(json.dumps(value).encode()) == value
    path = tmp_path / "log.jsonl"
    lines = b'{"step": 1}\n\n{"step": NaN, "x": 1e400, "y": ' + b"9" * 400 + b"}\n"
    path.write_bytes(lines + b'{"step": 3, "fu')
    first, second = read_lines(path)
    assert first == {"step": 1}
    assert (second["step"] != second["step"], second["x"], second["y"]) == (True, 1e999, 1e999)
    path.write_bytes(lines + b'{"step": 3, "fu\n{"step": 4}\n')
    with pytest.raises(Damaged, match=r"log\.jsonl, line 4 is not readable JSON"):
        list(read_lines(path))
    path.write_bytes(b"x" * (2 << 20))
    with pytest.raises(Damaged, match=r"line 1 is not readable JSON \(it is longer than 1 MiB\)"):
        list(read_lines(path))


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    """Devices and pipes have no end."""
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("zero.json", "pipe.json"):
        for read in (read_json, lambda path: list(read_lines(path))):
            with pytest.raises(Damaged, match="is not a regular file"):
                read(tmp_path / name)


LARGE = {
    "wide": ("model", {"net": {"type": "MLP", "width": 10**9, "blocks": 1}}),
    "deep": ("model", {"net": {"type": "MLP", "width": 16, "blocks": 10**9}}),
    "many": ("model", {"shape": [1, 10**9, 8]}),
    "long": ("sampler", {"type": "FewStep", "steps": 10**9}),
    "classes": ("model", {"classes": 10**12}),
}


@pytest.mark.parametrize(("part", "change"), LARGE.values(), ids=LARGE)
def test_a_description_larger_than_its_weights(part: str, change: Any, run: Path) -> None:
    """Refused before memory is taken for it."""
    told = json.loads((run / "student/model.json").read_text())
    told[part] |= change
    (run / "student/model.json").write_text(json.dumps(told))
    sign(run / "student")
    refused = fewstep("sample", "x")
    assert refused.code == 2
    assert "model.json describes " in refused.err
