"""How fast the playground is, and what hostile requests do to it: a student's run, as JSON.

    export PYTHONPATH=.
    python benchmarks/serve.py runs/sid     # writes benchmarks/results/serve.json

The browser tells its own times: until the page is loaded, and from a click to the student's
picture and to the teacher's. Normal requests are timed alone and beside hostile ones in turns, so
that what else the machine does is in both; and by the server's own clock of processor time, in
which only its work counts: for the normal request itself, and for all it was made to wait for.
What a hostile request is given with status 200 must be one of the page's own files, its card, or
the events of a picture; anything else is counted as from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fewstep.storage.files import read_json, write_json
from tests.browser import Browser
from tests.hostile_requests import Door, ask, hostile, normal
from tests.web.served import Served

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "serve.json"
FILES = ROOT / "fewstep" / "web"
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
    """Measure, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run of digits, its teacher beside it")
    parser.add_argument("--requests", type=int, default=10_000, help="hostile ones")
    parser.add_argument("--browser", action="store_true", help="measure the page's times alone")
    parser.add_argument("--out", type=Path, default=OUT)
    flags = parser.parse_args()
    with Served(flags.run.parent, flags.run.name) as served:
        result = {"browser": browse(served)}
        if not flags.browser:
            result |= under_fire(served, flags.requests)
        code, err = served.stop()
    known = read_json(flags.out) if flags.browser else {}
    if not flags.browser:
        result["server"] = {"exit_code": code, "errors": err.count("Error")}
    result = {**known, **result}
    write_json(flags.out, result)
    print(err)
    print(json.dumps(result, indent=2))


def browse(served: Served, visits: int = 5, clicks: int = 10) -> dict[str, Any]:
    """Milliseconds in a real browser, medians: of the page, and from a click to each picture."""
    pages, busy, times, load = [], [], [], os.getloadavg()[0]
    for _ in range(visits):
        with Browser() as browser:
            browser.call("Performance.enable", timeDomain="threadTicks")
            before = processor(served.process.pid)
            browser.open(served.address)
            loaded = "performance.getEntriesByType('navigation')[0].loadEventEnd"
            pages.append(browser.wait(loaded))
            server = 1000 * (processor(served.process.pid) - before)
            busy.append(server + processor_ms(browser))
            browser.wait(DONE)
            for seed in range(clicks):
                times.append(json.loads(browser.ask(CLICK.replace("SEED", str(seed + 1)))))
    return {
        "visits": visits,
        "clicks": visits * clicks,
        "page_ms": statistics.median(pages),
        "page_ms_worst": max(pages),
        "page_processor_ms": statistics.median(busy),
        "load_average": load,
        "cores": len(os.sched_getaffinity(0)),
        "first_picture_ms": statistics.median(t["student"] for t in times),
        "first_picture_ms_p95": statistics.quantiles([t["student"] for t in times], n=20)[-1],
        "first_picture_ms_worst": max(t["student"] for t in times),
        "both_pictures_ms": statistics.median(t["teacher"] for t in times),
    }


def under_fire(served: Served, count: int, blocks: int = 40, alone: int = 5) -> dict[str, Any]:
    """Statuses of hostile requests, and times of normal ones alone and beside them."""
    statuses: Counter[int] = Counter()
    door, leaks, outside = served.door, 0, 0
    own = known(door)
    quiet: list[tuple[float, float]] = []
    beside: list[tuple[float, float]] = []

    def fire(numbers: range) -> None:
        nonlocal leaks, outside
        for number in numbers:
            answer = ask(door, hostile(number, door))
            statuses[answer.status] += 1
            leaks += b"Traceback" in answer.body or b"root:" in answer.body
            outside += answer.status == 200 and not is_own(answer.body, own)

    for block in range(blocks):
        quiet += [timed(served, block * 1000 + i) for i in range(alone)]
        numbers = range(block * count // blocks, (block + 1) * count // blocks)
        attack = threading.Thread(target=fire, args=(numbers,))
        attack.start()
        while attack.is_alive():
            beside.append(timed(served, len(beside)))
        attack.join()
    p95, worked = (
        [statistics.quantiles([t[clock] for t in times], n=20)[-1] for times in (quiet, beside)]
        for clock in (0, 1)
    )
    return {
        "hostile": {
            "requests": sum(statuses.values()),
            "statuses": {str(k): v for k, v in sorted(statuses.items())},
            "server_errors": sum(v for k, v in statuses.items() if k >= 500),
            "leaks": leaks,
            "from_outside": outside,
        },
        "normal": {
            "requests_alone": len(quiet),
            "requests_beside": len(beside),
            "p95_ms_alone": 1000 * p95[0],
            "p95_ms_beside": 1000 * p95[1],
            "p95_ratio": p95[1] / p95[0],
            "p95_cpu_ms_alone": 1000 * worked[0],
            "p95_cpu_ms_beside": 1000 * worked[1],
            "p95_cpu_ratio": worked[1] / worked[0],
        },
    }


def processor_ms(browser: Browser) -> float:
    """Milliseconds of processor time that the page's main thread has had, whatever else ran."""
    metrics = browser.call("Performance.getMetrics")["metrics"]
    return 1000 * next(float(m["value"]) for m in metrics if m["name"] == "TaskDuration")


def known(door: Door) -> set[bytes]:
    """All that is served as it is: the files of the page, and the card of its models."""
    names = ("playground.html", "playground.css", "playground.js")
    head = f"Host: 127.0.0.1:{door.port}\r\nX-Fewstep-Token: {door.token}\r\nConnection: close"
    card = ask(door, f"GET /card HTTP/1.1\r\n{head}\r\n\r\n".encode())
    assert card.status == 200
    return {b"", card.body, *((FILES / name).read_bytes() for name in names)}


def is_own(body: bytes, own: set[bytes]) -> bool:
    """Whether an answer is one of these, or the events of a picture, a line of JSON each."""
    if body in own:
        return True
    try:
        events = [json.loads(line)["event"] for line in events_of(body).splitlines()]
    except (ValueError, KeyError, TypeError):
        return False
    return events[:1] == ["waiting"]


def events_of(body: bytes) -> bytes:
    """A body that came in chunks, as one."""
    whole = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        whole, body = whole + rest[:length], rest[length + 2 :]
    return whole


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


if __name__ == "__main__":
    main()
