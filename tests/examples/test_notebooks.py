"""The notebooks run from top to bottom in an empty folder, where their own assertions hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
NEEDS = {"digits": ("sklearn",), "your_pipeline": ("diffusers", "transformers", "peft")}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    """The cells of a kind, as they are saved."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


@each_notebook
def test_a_notebook_is_saved_without_outputs(path: Path) -> None:
    """So a change of it reads as one; and it asserts what it says."""
    code, text = cells(path, "code"), cells(path, "markdown")
    assert len(code) > 4
    assert "".join(text[0]["source"]).startswith("# ")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    said = "".join(line for cell in code for line in cell["source"])
    assert sum(line.strip().startswith("assert ") for line in said.splitlines()) >= 3


def test_every_notebook_is_named() -> None:
    names = {path.stem for path in NOTEBOOKS}
    assert names == set(NEEDS)
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    assert all(f"`{name}.ipynb`" in page for name in names)


def execute(notebook: Any, folder: Path) -> list[str]:
    """Run a notebook in a folder; what its cells print."""
    from nbclient import NotebookClient

    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output["text"] for output in outputs if output["output_type"] == "stream"]


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own assertions are of values; the pictures it shows are there."""
    pytest.importorskip("nbclient")
    for name in NEEDS[path.stem]:
        pytest.importorskip(name)
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    folder = tmp_path / "empty"
    folder.mkdir()
    printed = "".join(execute(notebook, folder))
    assert "step " in printed
    shown = [
        output["data"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "data" in output and "image/png" in output["data"]
    ]
    assert len(shown) == {"digits": 2, "your_pipeline": 1}[path.stem]


@pytest.mark.slow
def test_an_assertion_that_fails_is_noticed(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    import nbformat
    from nbclient.exceptions import CellExecutionError

    cell = nbformat.v4.new_code_cell("assert 1 == 2, 'no'")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
