"""The digits are scikit-learn's, read without importing it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fewstep.data import digits


def test_they_are_those_of_the_library() -> None:
    """All of them, pixel by pixel, in its order but for those held out."""
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    table = torch.from_numpy(digits._table())
    assert torch.equal(table[:, :-1].reshape(-1, 8, 8), torch.from_numpy(bunch.images))
    assert torch.equal(table[:, -1].long(), torch.from_numpy(bunch.target).long())
    train, held = digits.load_digits()
    assert (len(train.x0), len(held.x0)) == (1433, 364)
    every = torch.cat([train.x0, held.x0]).flatten(1).sort(0).values
    assert torch.equal(every, (table[:, :-1].float() / 8 - 1).sort(0).values)


def test_the_library_is_not_imported() -> None:
    code = (
        "import sys\n"
        "from fewstep.data.digits import load_digits\n"
        "load_digits()\n"
        "print(any(name.split('.')[0] == 'sklearn' for name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"come with scikit-learn: pip install 'fewstep\[demo\]'"):
        digits.load_digits()
    empty = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(digits, "find_spec", lambda name: empty)
    with pytest.raises(ValueError, match=r"has no .*digits.csv.gz; install it anew"):
        digits.load_digits()
