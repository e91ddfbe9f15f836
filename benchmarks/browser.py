"""The four pages in a real browser: a student's run of digits, its teacher beside it, as JSON.

    make browser RUN=runs/sid        # or: PYTHONPATH=. python benchmarks/browser.py runs/sid

drives headless Chromium over watch, serve, compare and report: load, generate, slide, enlarge,
compare, download, wrong input, a server that is gone, by the keyboard; each page light and dark at
390 and 1,400 pixels. Times of loading are told by the clock on the wall, which other work of the
machine lengthens, and by the processor's of the page alone. It writes
benchmarks/results/browser.json, and screenshots to --pictures. An axe-core script (npm install
axe-core; --axe FILE) judges how accessible the pages are; without one that part is left out and
said so. `--slowing N` measures instead what watching costs a run, in N pairs of trainings, and
adds that to the file.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serve import processor
from fewstep.storage.files import read_json, write_json
from tests.browser import Browser
from tests.hostile_requests import Door
from tests.web.served import Served

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "browser.json"
DONE = "document.getElementById('status').textContent.startsWith('done')"
LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"
PLACES = ((390, 844), (1400, 1000))
AXE = """
axe.run(document, {resultTypes: ["violations"]}).then((found) => JSON.stringify(
  found.violations.map((v) =>
    [v.impact, v.id, v.nodes.slice(0, 3).map((n) => n.html.slice(0, 120))])
))
"""
PLANTED = """
document.querySelector("main").insertAdjacentHTML("beforeend", '<img src="data:,">')
"""
Steps = dict[str, bool]


def main() -> None:
    """Drive the pages, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished, measured run of digits")
    parser.add_argument("--axe", type=Path, help="axe.min.js")
    parser.add_argument("--pictures", type=Path, default=Path("pages"), help="for screenshots")
    parser.add_argument("--slowing", type=int, default=0, metavar="N", help="pairs of runs")
    parser.add_argument("--out", type=Path, default=OUT)
    flags = parser.parse_args()
    flags.pictures.mkdir(exist_ok=True)
    axe = flags.axe.read_text(encoding="utf-8") if flags.axe else ""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        shutil.copytree(flags.run, home / "sid")
        if flags.slowing:
            found = {"watched": slowing(home, flags.slowing)}
        else:
            found = {"axe": bool(axe), "pages": visited(home, axe, flags.pictures)}
    known = read_json(flags.out) if flags.out.exists() else {}
    write_json(flags.out, {**known, **found})
    print(json.dumps(found, indent=2))


def visited(home: Path, axe: str, pictures: Path) -> dict[str, Any]:
    """What was found on each page."""
    pages = {}
    for name, (opened, visit) in PAGES.items():
        with opened(home) as address:
            found = looked_at(name, address, axe, pictures)
            found["steps"], found["console"] = visit(address, home)
        pages[name] = found
        print(name, json.dumps(found), flush=True)
    return pages


@contextmanager
def served(home: Path, verb: str) -> Iterator[str]:
    """The address of a page that a verb serves."""
    with Served(home, "sid", verb=verb) as page:
        SERVING[page.address] = page
        yield page.address


SERVING: dict[str, Served] = {}


@contextmanager
def written(home: Path, *args: str, page: str) -> Iterator[str]:
    """The address of a page that a verb writes."""
    subprocess.run(
        [sys.executable, "-m", "fewstep", *args, "--quiet"],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    yield (home / page).as_uri()


def looked_at(name: str, address: str, axe: str, pictures: Path) -> dict[str, Any]:
    """Load times, faults, requests to elsewhere, width and axe's findings, in four settings."""
    loaded, busy, served, faults, away, wide = [], [], [], [], [], []
    findings, seen = {}, []
    pid = SERVING[address].process.pid if address in SERVING else 0
    for width, height in PLACES:
        for dark in (False, True):
            with Browser(width, height, dark) as browser:
                browser.call("Performance.enable", timeDomain="threadTicks")
                before = processor(pid) if pid else 0.0
                browser.open(address)
                loaded.append(float(browser.wait(LOADED)))
                busy.append(processor_ms(browser))
                served.append(1000 * (processor(pid) - before) if pid else 0.0)
                if name == "serve":
                    browser.wait(DONE, 120)
                if browser.ask("document.documentElement.scrollWidth") > width:
                    wide.append(width)
                mode = "dark" if dark else "light"
                browser.screenshot(pictures / f"{name}-{width}-{mode}.png")
                if axe:
                    browser.ask(f"{axe}; null")
                    for impact, rule, nodes in json.loads(browser.ask(AXE)):
                        findings[rule] = {"impact": impact, "nodes": nodes}
                faults += browser.faults()
                away += elsewhere(browser, address)
                if axe:
                    browser.ask(PLANTED)
                    seen.append(any(x[1] == "image-alt" for x in json.loads(browser.ask(AXE))))
    return {
        "loads": len(loaded),
        "load_ms": round(statistics.median(loaded), 1),
        "load_ms_worst": round(max(loaded), 1),
        "load_processor_ms": round(statistics.median(busy), 1),
        "server_processor_ms": round(statistics.median(served), 1),
        "faults": faults,
        "outside_requests": away,
        "wider_than_the_window": wide,
        "axe_sees_a_planted_fault": all(seen) if seen else None,
        "axe_serious": {
            rule: one for rule, one in findings.items() if one["impact"] in ("serious", "critical")
        },
        "axe_other": sorted(
            rule for rule, one in findings.items() if one["impact"] not in ("serious", "critical")
        ),
    }


def processor_ms(browser: Browser) -> float:
    """Milliseconds of processor time that the page's main thread has had, whatever else ran."""
    metrics = browser.call("Performance.getMetrics")["metrics"]
    return 1000 * next(float(m["value"]) for m in metrics if m["name"] == "TaskDuration")


def elsewhere(browser: Browser, address: str) -> list[str]:
    """Requests that left the page's own address, or its file."""
    own = address if address.startswith("file:") else address.partition("/?")[0]
    return [u for u in browser.requests() if not u.startswith((own, "data:", "about:"))]


def tab_to(browser: Browser, condition: str, most: int = 80) -> bool:
    """Press Tab until the focused element fulfils a condition; whether one did."""
    for _ in range(most):
        browser.press("Tab")
        if browser.ask(f"Boolean(document.activeElement.{condition})"):
            return True
    return False


def visit_playground(address: str, _: Path) -> tuple[Steps, list[str]]:
    """Generate, slide, download, wrong input, no server: by the keyboard alone."""
    done: Steps = {}
    with Browser(1400, 1000) as browser:
        browser.open(address)
        browser.wait(DONE, 120)
        done["token leaves the address"] = browser.ask("location.search") == ""
        done["keyboard reaches the kinds"] = tab_to(browser, "name === 'kind'")
        browser.press("ArrowRight")
        browser.press("ArrowRight")
        steps = "document.querySelector('.teacher .place').textContent.includes('of 8')"
        browser.wait(steps, 120)
        browser.wait(DONE, 120)
        done["a walk of both models"] = True
        done["keyboard reaches the slider"] = tab_to(browser, "matches('.student .scrub input')")
        browser.press("Home")
        places = [
            browser.ask(f"document.querySelector('.{side} .place').textContent")
            for side in ("student", "teacher")
        ]
        done["both slide together"] = places == ["Picture 1 of 8"] * 2
        uri = str(browser.ask("document.querySelector('.student .save a').href"))
        done["download is a picture"] = base64.b64decode(uri.partition(",")[2])[1:4] == b"PNG"
        browser.ask("document.getElementById('seed').focus()")
        browser.ask("document.getElementById('seed').select()")
        browser.type("1")
        error = "document.getElementById('error').textContent"
        browser.wait(f"{error}.includes('two that differ')")
        done["wrong input is a sentence"] = True
        faults = [fault for fault in browser.faults() if "status of 400" not in fault]
        SERVING[address].stop()
        browser.ask("document.getElementById('go').click()")
        browser.wait(f"{error}.includes('does not answer')", 60)
        done["a server that is gone is told"] = True
    return done, faults


def visit_watch(address: str, home: Path) -> tuple[Steps, list[str]]:
    """Slide, enlarge, news of the run, no server: by the keyboard alone."""
    done: Steps = {}
    with Browser(1400, 1000) as browser:
        browser.open(address)
        browser.wait("document.getElementById('live-text').textContent")
        done |= visit_report_parts(browser)
        if browser.ask("document.querySelector('.live progress').value") == 1:
            done["a finished run is not asked for again"] = True
        faults = browser.faults()
    log = home / "sid" / "log.jsonl"
    whole = log.read_bytes()
    (home / "sid" / "student").rename(home / "student")  # as if it still went on
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:-3]))
    try:
        with Browser(1400, 1000) as browser:
            browser.open(f"{address}")
            browser.wait("document.getElementById('live-text').textContent")
            time.sleep(3)
            before = browser.ask("document.getElementById('content').textContent.length")
            log.write_bytes(whole)
            changed = f"document.getElementById('content').textContent.length !== {before}"
            browser.wait(changed, 120)
            done["news of the run arrive by themselves"] = True
            SERVING[address].stop()
            gone = "document.getElementById('live-text').textContent.includes('gone')"
            browser.wait(gone, 60)
            done["a server that is gone is told"] = True
            faults += [f for f in browser.faults() if "CONNECTION_REFUSED" not in f]
    finally:
        (home / "student").rename(home / "sid" / "student")
    return done, faults


def visit_report_parts(browser: Browser) -> Steps:
    """What watch and report share: the slider over time, and pictures that grow."""
    done: Steps = {}
    done["keyboard enlarges a picture"] = tab_to(browser, "matches('img.zoom')")
    browser.press("Enter")
    done["keyboard enlarges a picture"] &= bool(
        browser.ask("document.querySelector('dialog').open")
    )
    browser.ask("document.getElementById('close').focus()")
    browser.press("Enter")
    done["and closes it"] = not browser.ask("document.querySelector('dialog').open")
    done["keyboard reaches the slider"] = tab_to(browser, "id === 'frame-at'")
    last = browser.ask("document.getElementById('frame').src")
    browser.press("Home")
    step = browser.ask("document.getElementById('frame-step').textContent")
    first = browser.ask("document.getElementById('frame').src")
    done["it slides to the first step"] = step == "0" and first != last
    return done


def visit_report(address: str, home: Path) -> tuple[Steps, list[str]]:
    """Slide, enlarge, values under the pointer, scores as files."""
    with Browser(1400, 1000) as browser:
        browser.open(address)
        done = visit_report_parts(browser)
        titles = browser.ask("document.querySelectorAll('svg.chart use title').length")
        done["values under the pointer"] = titles > 10
        links = "[...document.querySelectorAll('a[download]')].map((a) => [a.download, a.href])"
        files = {name.rpartition("-")[2]: uri for name, uri in browser.ask(links)}
        texts = {n: base64.b64decode(u.partition(",")[2]).decode() for n, u in files.items()}
        stored = read_json(home / "sid" / "metrics.json")
        value = stored["student"][stored["protocol"]["distance"]]
        rows = list(csv.reader(io.StringIO(texts["scores.csv"])))
        done["scores as CSV"] = any(row[2] == repr(value) for row in rows)
        same = json.loads(texts["scores.json"])["student"] == stored["student"]
        done["scores as JSON"] = same
        return done, browser.faults()


def visit_compare(address: str, _: Path) -> tuple[Steps, list[str]]:
    """The table of both runs, and their charts."""
    with Browser(1400, 1000) as browser:
        browser.open(address)
        text = str(browser.ask("document.getElementById('table').textContent"))
        charts = browser.ask("document.querySelectorAll('svg.chart').length")
        done = {"both runs in the table": "sid" in text and "teacher" in text}
        done["charts over time"] = charts > 0
        done["keyboard reaches the page"] = tab_to(browser, "matches('a, summary, [tabindex]')")
        return done, browser.faults()


Visit = Callable[[str, Path], tuple[Steps, list[str]]]
PAGES: dict[str, tuple[Callable[[Path], Any], Visit]] = {
    "serve": (lambda home: served(home, "serve"), visit_playground),
    "watch": (lambda home: served(home, "watch"), visit_watch),
    "report": (lambda home: written(home, "report", "sid", page="sid/report.html"), visit_report),
    "compare": (
        lambda home: written(home, "compare", "sid", "sid/teacher", page="compare.html"),
        visit_compare,
    ),
}


def slowing(home: Path, pairs: int, steps: int = 120) -> dict[str, Any]:
    """Seconds of processor time of the same training, alone and watched, in turns.

    A reader asks for the state twice a second, four times as often as a page does, and reads the
    page whenever it is new.
    """
    times: dict[str, list[float]] = {"alone": [], "watched": []}
    for pair in range(pairs):
        for kind in ("alone", "watched") if pair % 2 == 0 else ("watched", "alone"):
            times[kind].append(trained(home, f"{kind}{pair}", steps, kind == "watched"))
    changes = [b / a - 1 for a, b in zip(times["alone"], times["watched"], strict=True)]
    return {
        "pairs": pairs,
        "steps": steps,
        "alone_s": times["alone"],
        "watched_s": times["watched"],
        "slower_median": statistics.median(changes),
        "slower": changes,
    }


def trained(home: Path, name: str, steps: int, watched: bool) -> float:
    """Processor time of one training, as the system counts it for that process alone."""
    command = [sys.executable, "-m", "fewstep", "distill", "digits", "--teacher", "sid/teacher"]
    command += ["--out", name, "--steps", str(steps), "--batch", "64"]
    command += ["--sample-every", "20", "--quiet"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=home, env=env)
    over = threading.Event()
    if watched:
        while not (home / name / "log.jsonl").exists():
            time.sleep(0.2)
        with Served(home, name, verb="watch") as page:
            reader = threading.Thread(target=read, args=(page.door, over))
            reader.start()
            _, status, used = os.wait4(process.pid, 0)
            over.set()
            reader.join()
    else:
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, name
    return used.ru_utime + used.ru_stime


def read(door: Door, over: threading.Event) -> None:
    """Ask for the state of a run twice a second, and for its page when it is new."""
    import urllib.request

    version = None
    while not over.wait(0.5):
        for path in ("state", ""):
            request = urllib.request.Request(f"http://127.0.0.1:{door.port}/{path}")
            request.add_header("X-Fewstep-Token", door.token)
            try:
                answer = urllib.request.urlopen(request, timeout=30).read()
            except OSError:
                break
            if path and json.loads(answer)["version"] == version:
                break
            version = json.loads(answer)["version"] if path else version


if __name__ == "__main__":
    main()
