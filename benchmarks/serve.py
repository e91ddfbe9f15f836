"""How fast the playground is, and what hostile requests do to it: a student's run, as JSON.

    export PYTHONPATH=.
    python benchmarks/serve.py runs/sid            # writes benchmarks/results/serve.json
    python benchmarks/serve.py runs/sid --picture  # writes docs/images/serve.png instead

The browser tells its own times: until the page is loaded, and from a click to the student's
picture and to the teacher's. Normal requests are timed alone and beside hostile ones in turns, so
that what else the machine does is in both; and by the server's own clock of processor time, in
which only its work counts: for the normal request itself, and for all it was made to wait for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fewstep.storage.files import write_json
from tests.browser import Browser
from tests.hostile_requests import ask, hostile, normal
from tests.web.served import Served

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "serve.json"
PICTURE = ROOT / "docs" / "images" / "serve.png"
DONE = "document.getElementById('status').textContent.startsWith('done')"
CLICK = """
new Promise((resolve) => {
  const began = performance.now(), times = {};
  const panels = ["student", "teacher"].map((side) => document.querySelector("." + side));
  const look = () => panels.forEach((panel) => {
    const side = panel.classList[1];
    if (!panel.querySelector(".save a").hidden && !(side in times)) {
      times[side] = performance.now() - began;
      const both = Object.keys(times).length === 2;
      if (both) requestAnimationFrame(() => resolve(JSON.stringify(times)));
    }
  });
  document.getElementById("seed").value = SEED;
  document.getElementById("go").click();
  new MutationObserver(look).observe(document.body, {attributes: true, subtree: true});
})
"""


def main() -> None:
    """Measure, or draw the picture of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run of digits, its teacher beside it")
    parser.add_argument("--requests", type=int, default=10_000, help="hostile ones")
    parser.add_argument("--picture", action="store_true")
    flags = parser.parse_args()
    with Served(flags.run.parent, flags.run.name) as served:
        if flags.picture:
            draw(served)
            return
        result = {"browser": browse(served), **under_fire(served, flags.requests)}
        code, err = served.stop()
    result["server"] = {"exit_code": code, "errors": err.count("Error")}
    write_json(OUT, result)
    print(json.dumps(result, indent=2))


def browse(served: Served, visits: int = 5, clicks: int = 10) -> dict[str, Any]:
    """Milliseconds in a real browser, medians: of the page, and from a click to each picture."""
    pages, times = [], []
    for _ in range(visits):
        with Browser() as browser:
            browser.open(served.address)
            loaded = "performance.getEntriesByType('navigation')[0].loadEventEnd"
            pages.append(browser.wait(loaded))
            browser.wait(DONE)
            for seed in range(clicks):
                times.append(json.loads(browser.ask(CLICK.replace("SEED", str(seed + 1)))))
    return {
        "visits": visits,
        "clicks": visits * clicks,
        "page_ms": statistics.median(pages),
        "page_ms_worst": max(pages),
        "first_picture_ms": statistics.median(t["student"] for t in times),
        "first_picture_ms_worst": max(t["student"] for t in times),
        "both_pictures_ms": statistics.median(t["teacher"] for t in times),
    }


def under_fire(served: Served, count: int, blocks: int = 40, alone: int = 5) -> dict[str, Any]:
    """Statuses of hostile requests, and times of normal ones alone and beside them."""
    statuses: Counter[int] = Counter()
    door, leaks = served.door, 0
    quiet: list[tuple[float, float]] = []
    beside: list[tuple[float, float]] = []

    def fire(numbers: range) -> None:
        nonlocal leaks
        for number in numbers:
            answer = ask(door, hostile(number, door))
            statuses[answer.status] += 1
            leaks += b"Traceback" in answer.body or b"root:" in answer.body

    for block in range(blocks):
        quiet += [timed(served, block * 1000 + i) for i in range(alone)]
        numbers = range(block * count // blocks, (block + 1) * count // blocks)
        attack = threading.Thread(target=fire, args=(numbers,))
        attack.start()
        while attack.is_alive():
            beside.append(timed(served, len(beside)))
        attack.join()
    p95, own = (
        [statistics.quantiles([t[clock] for t in times], n=20)[-1] for times in (quiet, beside)]
        for clock in (0, 1)
    )
    return {
        "hostile": {
            "requests": sum(statuses.values()),
            "statuses": {str(k): v for k, v in sorted(statuses.items())},
            "server_errors": sum(v for k, v in statuses.items() if k >= 500),
            "leaks": leaks,
        },
        "normal": {
            "requests_alone": len(quiet),
            "requests_beside": len(beside),
            "p95_ms_alone": 1000 * p95[0],
            "p95_ms_beside": 1000 * p95[1],
            "p95_ratio": p95[1] / p95[0],
            "p95_cpu_ms_alone": 1000 * own[0],
            "p95_cpu_ms_beside": 1000 * own[1],
            "p95_cpu_ratio": own[1] / own[0],
        },
    }


def timed(served: Served, seed: int) -> tuple[float, float]:
    """Seconds of a normal request, which is answered whole, and of the server's processor time."""
    began, used = time.perf_counter(), processor(served.process.pid)
    answer = ask(served.door, normal(served.door, seed), stays=60)
    assert answer.status == 200
    assert b'{"event":"end"}' in answer.body
    return time.perf_counter() - began, processor(served.process.pid) - used


def processor(pid: int) -> float:
    """Seconds of processor time that a process has had so far, threads that ended included.

    By the clock of that process, as clock_getcpuclockid(3) names it on Linux.
    """
    return time.clock_gettime((~pid << 3) | 2)


def draw(served: Served) -> None:
    """The page as it is, of a student in four steps."""
    with Browser(1000, 1000) as browser:
        browser.open(f"{served.address}#kind=picture&seed=4&label=3&steps=4")
        browser.wait(DONE)
        time.sleep(0.3)
        browser.screenshot(PICTURE)


if __name__ == "__main__":
    main()
