"""Write an export to a temporary place, and move it to its own once it has been checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.storage.files import require_vacant


@contextmanager
def new_output(out: Path, suffix: str = "") -> Iterator[Path]:
    """A path of the same name to write to, alone in a folder that goes away.

    What is in that folder when the block ends, `out` itself and what belongs beside it, is moved
    into place; after an error nothing is. `suffix`: of a file, "" for a folder. ValueError where
    something is there already.
    """
    if suffix and (out.suffix != suffix or out.exists()):
        raise ValueError(f"{out} should be a new file that ends in {suffix}")
    require_vacant(out)
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent} to write {out.name} to")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial / out.name
        made = sorted(partial.iterdir())
        for path in made:
            if path.name != out.name and (out.parent / path.name).exists():
                raise ValueError(f"{out.parent / path.name} exists already; move it away")
        if out.exists():
            out.rmdir()
        for path in made:
            path.replace(out.parent / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
