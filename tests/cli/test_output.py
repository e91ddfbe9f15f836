"""--json and --quiet, which every verb has: one JSON value on standard output, and no more."""

from __future__ import annotations

import ast
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from fewstep import __version__
from fewstep.cli import VERBS, output
from fewstep.cli.parser import verb_parser
from fewstep.recipes.digits import digits, digits_teacher
from tests.command import DISTIL, SMALL, fewstep

RUN = {"run", "finished", "model"}
ADAPT = ("runs/sid", "--base", "runs/teacher", "--tuned", "runs/teacher", "--steps", "2")
CASES: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "demo": (("--out", "OUT"), {"run", "metrics", "report"}),
    "recipes": (("--for", "no data"), {"scenes", "notes", "rows"}),
    "plan": (
        ("runs/teacher", "--gpus", "1x24GB", "--recipe", "digits"),
        {"recipe", "method", "batch", "steps", "gpus", "links", "refused", "command", "rows"},
    ),
    "train": (("digits_teacher", *SMALL, "--steps", "2", "--out", "OUT"), RUN),
    "distill": ((*DISTIL[1:], "--teacher", "runs/teacher", "--dry-run"), {"run", "cost"}),
    "adapt": ((*ADAPT, "--out", "OUT"), RUN),
    "sample": (("runs/sid", "--out", "OUT.png"), {"file"}),
    "evaluate": (("COPY", "--samples", "100", "--draws", "1"), {"real", "teacher", "student"}),
    "stats": (("pictures", "--out", "OUT.npz"), {"file"}),
    "report": (("COPY",), {"report"}),
    "watch": (("runs/sid",), {"address"}),
    "serve": (("runs/sid",), {"address"}),
    "compare": (("runs/sid", "--no-page"), set()),
    "export": (
        ("runs/sid", "OUT", "--to", "space"),
        {"file", "format", "difference", "notes"},
    ),
    "push": (
        (
            "runs/sid",
            "me/it",
            "--to",
            "space",
            *("--licence", "mit", "--base-model", "none"),
            "--dry-run",
        ),
        {"repository", "kind", "licence", "base_model", "files", "address"},
    ),
    "inspect": (("runs/sid",), set()),
    "convert": (("snapshot.pkl", "OUT"), {"model"}),
    "ema": (
        ("runs/sid", "--sigma-rel", "0.1", "--out", "OUT"),
        {"model", "sigma_rel", "note"},
    ),
    "data": (("check", "pictures", "--sheet", "OUT.png"), {"path", "pictures", "shape", "sheet"}),
    "doctor": ((), {"torch", "self-test", "problems"}),
}


@pytest.fixture
def prepared(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished runs, with what takes long or needs large files left out of the verbs."""
    import shutil

    from PIL import Image

    for name, folder in (("runs", tmp_path / "runs"), ("runs/sid", tmp_path / "COPY")):
        shutil.copytree(finished / name, folder)
    (tmp_path / "snapshot.pkl").touch()
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/a.png")
    monkeypatch.chdir(tmp_path)

    def small(make: Callable[[], Any]) -> Callable[[], Any]:
        model = make().model
        model = replace(model, net=replace(model.net, width=16, blocks=1))

        @wraps(make)
        def run() -> Any:
            return replace(make(), model=model, steps=2, batch=8, sample_every=2, save_every=2)

        return run

    def serve(application: Any, port: int, ready: Callable[[Any], None]) -> None:
        from types import SimpleNamespace

        ready(SimpleNamespace(address="http://127.0.0.1:1/"))

    for place, value in {
        "fewstep.recipes.digits.digits": small(digits),
        "fewstep.recipes.digits.digits_teacher": small(digits_teacher),
        "fewstep.cli.doctor.FREE": 0,
        "fewstep.cli.evaluate_fid50k.make_stats": lambda *_: None,
        "fewstep.teachers.snapshots.convert": lambda *_: None,
        "fewstep.runs.averages.write_average": lambda *_: "a note",
        "fewstep.web.shell.serve": serve,
    }.items():
        monkeypatch.setattr(place, value)
    return tmp_path


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_prints_its_result_alone(
    verb: str, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verb in CASES, "add its line to CASES, above: arguments, and keys of its --json"
    args, keys = CASES[verb]
    if verb == "demo":  # its own numbers are those of evaluate
        scores = {"real": {"fd": 1.0}}
        monkeypatch.setattr("fewstep.cli.measure.measured", lambda *_, **__: scores)
    found = fewstep(verb, *args, "--json", "--quiet")
    assert (found.code, found.err) == (0, ""), found
    assert keys <= set(json.loads(found.out))


def test_without_them(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Text on standard output, notes on standard error; the flags of a command end with it."""
    monkeypatch.chdir(finished)
    args = ("export", "runs/sid", "--to", "space")
    assert fewstep(*args, str(tmp_path / "a"), "--json", "--quiet").err == ""
    found = fewstep(*args, str(tmp_path / "b"))
    assert found.out == f"{tmp_path / 'b'}\n"
    assert "differs from the student" in found.err
    assert fewstep(*args, str(tmp_path / "c"), "--quiet") == (0, f"{tmp_path / 'c'}\n", "")
    wrong = fewstep("export", "nothing", str(tmp_path / "d"), "--json", "--quiet")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith("fewstep: ")


@pytest.mark.parametrize(
    ("closed", "args", "code", "out", "err"),
    [
        (1, ("--version",), 0, "", ""),
        (1, ("recpies",), 2, "", "fewstep: there is no verb 'recpies'; did you mean 'recipes'?\n"),
        (2, ("recpies",), 2, "", ""),
        (2, ("--version",), 0, f"fewstep {__version__}\n", ""),
        (0, ("--version",), 0, f"fewstep {__version__}\n", ""),
    ],
)
def test_closed_streams(closed: int, args: tuple[str, ...], code: int, out: str, err: str) -> None:
    """Python has None for them; errors stay away from standard output."""
    command = shlex.join([sys.executable, "-m", "fewstep", *args]) + f" {closed}>&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_results_are_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    output.begin()
    output.result({"a": 1}, "text")
    output.result({"a": 1})
    assert capsys.readouterr().out == "text\n"
    verb_parser("verb", "For a test.").parse_args(["--json"])
    value = {1: [float("nan"), 2.5, Path("x"), (True, None)], "\u202e": "\u202e"}
    output.result(value, "text")
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"1": [None, 2.5, "x", [True, None]], "\u202e": "\u202e"}
    assert printed.isascii()
    output.begin()
    assert not output.as_json()


def test_verbs_print_nowhere_else() -> None:
    """`print` stands in `result`, in help and errors; a verb that prints by itself is seen."""
    folder = Path(output.__file__).parent
    assert {path.stem for path in folder.glob("*.py") if prints(path.read_text())} == {
        *("__init__", "output")
    }
    assert prints("def run():\n    print('a')")
    assert not prints("print(parser.format_help())\nprint(text, file=sys.stderr)")


def prints(source: str) -> bool:
    """Whether a source prints to standard output what is no help."""
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    texts = [ast.unparse(node) for node in calls]
    return any("help" not in text and "file=" not in text for text in texts)
