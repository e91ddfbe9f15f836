"""The pictures of the served pages that the README and the documentation show.

    make page-pictures RUN=runs/demo    # or: PYTHONPATH=. python benchmarks/page_pictures.py RUN

takes a finished run of digits with its teacher beside it, serves it, and writes
docs/images/serve.png, the playground with a grid of digits of both models, and
docs/images/watch.png, the page of the run as it was at 60 % of its steps. A palette keeps the
files small.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
import time
from pathlib import Path

from PIL import Image

from benchmarks.browser import DONE, in_progress
from fewstep.storage.files import write
from tests.browser import Browser
from tests.web.served import Served

IMAGES = Path(__file__).parent.parent / "docs" / "images"
SIZE = 1180, 860
COLOURS = 255
GRID = "#kind=grid&seed=0&count=60&steps=1"


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run of digits, its teacher beside it")
    run = parser.parse_args().run
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        shutil.copytree(run, home / "sid")
        with Served(home, "sid") as served:
            draw(served.address + GRID, DONE, IMAGES / "serve.png")
        with in_progress(home) as address:
            ready = "document.getElementById('frame').complete"
            draw(address, ready, IMAGES / "watch.png")


def draw(address: str, ready: str, out: Path) -> None:
    """The window at an address, once an expression of JavaScript is true, as a small PNG file."""
    with Browser(*SIZE) as browser, tempfile.TemporaryDirectory() as place:
        browser.open(address)
        browser.wait(ready, 120)
        time.sleep(0.5)
        shot = Path(place) / "shot.png"
        browser.screenshot(shot, whole=False)
        with Image.open(shot) as picture:
            few = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        data = io.BytesIO()
        few.save(data, "png", optimize=True)
    write(out, data.getvalue())
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
