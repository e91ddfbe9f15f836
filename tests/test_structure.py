"""The shape of the code, read from its syntax trees: who imports whom, sizes, and banned calls."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fewstep
from fewstep.cli import VERBS
from fewstep.config import MODULES, ROOMS

PACKAGE = Path(fewstep.__file__).parent
REPOSITORY = PACKAGE.parent
ORDER = (
    *("config", "signals", "diffusion", "losses", "nets", "distillation", "methods"),
    *("training", "storage", "safe_pickle", "teachers", "data", "eval", "domains", "runs"),
    *("recipes", "report", "export", "plan", "compare", "web", "cli"),
)
"""The rooms from the ground up: a room knows those before it, and no other."""
CORE = ORDER[: ORDER.index("storage") + 1]
"""Rooms that need torch, numpy and safetensors alone."""
MAX_FUNCTION = 60


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a tree but what stands under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from nodes(node)


def imported(tree: ast.AST, known: Mapping[str, object] = SOURCES) -> set[str]:
    """The modules a tree imports anywhere, within functions too."""
    found: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in inner}
    return found


def graph() -> dict[str, set[str]]:
    """module -> the modules of this package that it imports."""
    out = {}
    for name, tree in TREES.items():
        inside = {other for other in imported(tree) if other.partition(".")[0] == "fewstep"}
        assert inside <= SOURCES.keys(), f"{name} imports what does not exist: {inside}"
        out[name] = inside - {name}
    return out


def reachable(name: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    queue = [name]
    while queue:
        for other in edges[queue.pop()] - seen:
            seen.add(other)
            queue.append(other)
    return seen


def test_the_import_graph_has_no_cycle() -> None:
    """Imports within functions counted, so that none hides a cycle."""
    edges = graph()
    assert len(edges) > 50
    order = list(TopologicalSorter(edges).static_order())
    assert order.index("fewstep.diffusion.noise_path") < order.index("fewstep.diffusion.types")
    with pytest.raises(CycleError):
        TopologicalSorter(
            {**edges, "fewstep.diffusion.noise_path": {"fewstep.runs.runner"}}
        ).prepare()


def room(name: str) -> str:
    """The file or folder of fewstep/ that a module belongs to."""
    return name.split(".")[1]


def misplaced(edges: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Imports of a room by one that stands before it."""
    return [
        (name, other)
        for name, targets in sorted(edges.items())
        for other in sorted(targets)
        if ORDER.index(room(name)) < ORDER.index(room(other))
    ]


def test_every_room_knows_those_before_it_alone() -> None:
    """The rooms are the files and folders that are there: a new one has to be given its place."""
    here = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or any(p.glob("*.py"))}
    assert {name for name in here if not name.startswith("__")} == set(ORDER)
    edges = {
        name: {other for other in targets if "." in other}
        for name, targets in graph().items()
        if "." in name and "__" not in name
    }
    assert sum(map(len, edges.values())) > 300
    assert misplaced(edges) == []
    planted = {"fewstep.losses.score": {"fewstep.training.loop"}}
    assert misplaced(planted) == [("fewstep.losses.score", "fewstep.training.loop")]


def test_losses_know_paths_and_each_other_alone() -> None:
    edges = graph()
    names = [name for name in edges if name.startswith("fewstep.losses.")]
    assert len(names) >= 4
    for name in names:
        others = {other for other in edges[name] if not other.startswith("fewstep.losses")}
        assert others <= {"fewstep.diffusion.noise_path"}, name


def test_methods_know_neither_each_other_nor_the_loop() -> None:
    edges = graph()
    methods = [name for name in edges if name.startswith("fewstep.methods.")]
    assert len(methods) >= 6
    for name in methods:
        rooms = {room(other) for other in reachable(name, edges) if "." in other}
        assert not rooms & {"methods", "training", "storage", "runs"}, name


def test_the_core_is_torch_numpy_and_safetensors_alone() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "safetensors", "fewstep"}
    names = [name for name in SOURCES if "." in name and room(name) in CORE]
    assert len(names) > 50
    for name in names:
        others = {other.partition(".")[0] for other in imported(TREES[name])}
        assert others <= allowed, f"{name} imports {others - allowed}"


def imported_at_once() -> dict[str, set[str]]:
    """module -> what its import imports: packages around it, and what stands outside functions."""
    edges: dict[str, set[str]] = defaultdict(set)
    for name, tree in TREES.items():
        top = ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
        edges[name] = imported(top) | {name.rpartition(".")[0]} - {""}
    return edges


def test_verbs_import_the_standard_library_alone() -> None:
    """What needs more stands in the functions that need it, so that --help is there at once."""
    entries = {"fewstep.__main__", *(f"fewstep.cli.{verb}" for verb in VERBS)}
    assert entries <= SOURCES.keys()
    edges = imported_at_once()
    allowed = {"fewstep", *sys.stdlib_module_names}
    for name in entries:
        assert {other.partition(".")[0] for other in reachable(name, edges)} <= allowed, name
    edges["fewstep.cli.output"].add("numpy")
    assert "numpy" in reachable("fewstep.cli.train", edges)


def test_functions_stay_short() -> None:
    long, count = {}, 0
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                size = (node.end_lineno or 0) - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    size -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
                count += 1
                if size > MAX_FUNCTION:
                    long[f"{name}.{node.name}"] = size
    assert count > 300
    assert long == {}


PARTS = {"Net", "Method", "Sampler", "NoisePath", "TimeLaw", "Distance", "Weight"}
"""Classes whose subclasses run.json records by name."""


def unreadable(trees: Mapping[str, ast.AST]) -> list[str]:
    """Subclasses of `PARTS` in modules where `fewstep.config` looks up no name."""
    found = []
    for name, tree in trees.items():
        inner = name.partition(".")[2]
        if inner.partition(".")[0] in ROOMS or inner in MODULES:
            continue
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        found += [
            f"{name}.{node.name}"
            for node in classes
            if PARTS & {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        ]
    return found


def test_what_a_run_records_can_be_read_again() -> None:
    wanted = unreadable(TREES)
    assert not wanted, "no run of these can be read again: move them to one of config.ROOMS"
    planted = ast.parse("class Mine(Net): ...")
    trees = {"fewstep.teachers.mine": planted, "fewstep.nets.mine": planted}
    assert unreadable(trees) == ["fewstep.teachers.mine.Mine"]


WITHOUT_TEST_FILE = {
    "": "signals",
    "cli": (
        "convert demo distill doctor dry_run ema evaluate export measure plan recipes report "
        "run_flags stats train"
    ),
    "data": "captions embeddings errors labels mnist npz pack readers",
    "diffusion": "encoder_features generator model pixels",
    "distillation": "critic",
    "domains": "digits domain latents ring",
    "eval": (
        "digit_features dinov2 domain_scores fid50k inception_torchscript load_features "
        "neighbours prompt_scores"
    ),
    "export": "atomic_output fewstep_solver schedulers",
    "losses": "weight",
    "methods": "diff_instruct pretrain sim",
    "nets": "attention edm2 edm_layers edm_precond mlp precond unet",
    "recipes": "digits mnist registry text_to_image",
    "report": "formatting headline plots reasons run_data sample_images svg_chart tables",
    "runs": "environment inspection monitor run run_folder runner session",
    "safe_pickle": "allowed_names limits records storages virtual_machine",
    "storage": "files folder_lock model_folder safetensors_header",
    "teachers": "edm2",
    "teachers.diffusers": (
        "adapter_base adapters compatibility completed_config network parts text_and_vae"
    ),
    "training": "ema optim",
}
"""Modules that have no test file of their own name. The list gets shorter, not longer."""


def file_of_tests(name: str) -> str:
    """Where the tests of a module stand: fewstep.losses.score in tests/losses/test_score.py."""
    *rooms, last = name.split(".")[1:]
    return "/".join((*rooms, f"test_{last}.py"))


def without_test_file(names: Iterable[str], files: Collection[str]) -> set[str]:
    """Modules whose file is not among `files`; `__init__` and `__main__` need none."""
    modules = {name for name in names if "." in name and "__" not in name}
    return {name for name in modules if file_of_tests(name) not in files}


def test_every_module_has_a_test_file() -> None:
    """But for those above: a new one needs its own, and what has one leaves the list."""
    tests = REPOSITORY / "tests"
    files = {path.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")}
    packages = {module_name(path) for path in PACKAGE.rglob("__init__.py")}
    missing = without_test_file(SOURCES.keys() - packages, files)
    known = {
        ".".join(part for part in ("fewstep", room, module) if part)
        for room, modules in WITHOUT_TEST_FILE.items()
        for module in modules.split()
    }
    wanted = sorted(f"tests/{file_of_tests(name)}" for name in missing - known)
    assert not wanted, "each new module has its test file: write these"
    assert known - missing == set(), "these have a test file, or are gone: strike them off"
    planted = {"fewstep.losses.score", "fewstep.losses.new", "fewstep.new", "fewstep.__main__"}
    assert without_test_file(planted, files) == {"fewstep.losses.new", "fewstep.new"}


BANNED_MODULES = {"pickle", "cPickle", "_pickle", "dill", "marshal", "shelve", "joblib", "yaml"}
BANNED_CALLS = {
    *("eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "torch.hub.load"),
    *("os.system", "os.popen", "pandas.read_pickle", "pty.spawn"),
}


def offences(tree: ast.AST) -> list[str]:
    """Calls that run or unpickle what they read, under whatever name they were imported."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    modules = {part for name in imported(tree) for part in name.split(".")}
    found = [f"import {name}" for name in sorted(modules & BANNED_MODULES)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            head, dot, tail = called.partition(".")
            called = f"{names.get(head, head)}{dot}{tail}".removeprefix("builtins.")
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            safe = keywords.get("allow_pickle") == "False"
            if called in BANNED_CALLS or (called == "numpy.load" and not safe):
                found.append(called)
            if called.split(".")[-1] in ("extractall", "extract"):
                found.append("extractall")
            if keywords.get("shell", "False") != "False":
                found.append("shell")
            if keywords.get("allow_pickle", "False") != "False":
                found.append("allow_pickle")
            if "trust_remote_code" in keywords:
                found.append("trust_remote_code")
    return found


EXEMPT = {"fewstep.eval.inception_torchscript": ["torch.jit.load"]}
"""One file of one known SHA-256; tests/eval/test_features.py shows that no other is opened."""


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_runs_or_unpickles_what_it_reads(name: str) -> None:
    assert offences(TREES[name]) == EXEMPT.get(name, [])


BAD = {
    "import pickle": "import pickle",
    "from pickle import loads": "import pickle",
    "import yaml; yaml.load(x)": "import yaml",
    "import torch; torch.load(p)": "torch.load",
    "import torch as t; t.load(p)": "torch.load",
    "from torch import load as read; read(p)": "torch.load",
    "torch.jit.load(p)": "torch.jit.load",
    "eval('1')": "eval",
    "import builtins; builtins.exec('1')": "exec",
    "def f():\n    exec(x)": "exec",
    "import numpy as np; np.load(p)": "numpy.load",
    "import numpy as np; np.load(p, allow_pickle=True)": "numpy.load",
    "from numpy import load; load(p)": "numpy.load",
    "z.extractall()": "extractall",
    "import subprocess as s; s.run(c, shell=True)": "shell",
    "from os import system; system(c)": "os.system",
    "M.from_pretrained(n, trust_remote_code=True)": "trust_remote_code",
}
GOOD = """
import json, numpy as np
from safetensors.torch import load
model.eval(); load(b); json.load(f); np.load(p, allow_pickle=False); re.compile(p)
found.loader.exec_module(module); subprocess.run(c, shell=False)
"""


def test_the_ban_finds_every_offence_and_nothing_else() -> None:
    for text, expected in BAD.items():
        assert offences(ast.parse(text))[:1] == [expected], text
    assert offences(ast.parse(GOOD)) == []
