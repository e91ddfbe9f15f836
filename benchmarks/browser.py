"""The pages in a real browser: a student's run of digits, its teacher beside it, as JSON.

    make browser RUN=runs/sid        # or: PYTHONPATH=. python benchmarks/browser.py runs/sid

drives headless Chromium over watch, serve, compare, report and the arena: load, generate, slide,
enlarge, compare, download, wrong input, a server that is gone, by the keyboard; each page light
and dark at 390 and 1,400 pixels, watch of a finished run and of one in progress. Words that are
cut off or leave their place are listed, and a fault that is planted in each page must be. Times
of loading are told by the clock on the wall, which other work of the machine lengthens, and by the
processor's of the page alone. It writes benchmarks/results/browser.json, and screenshots to
--pictures.
An axe-core script (npm install axe-core; --axe FILE) judges how accessible the pages are; without
one that part is left out and said so. `--slowing N` measures instead what watching costs a run, in
N pairs of stretches of one training, watched and alone in turns, and adds that to the file.
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

from benchmarks.arena import html_page, pages
from benchmarks.serve import processor, processor_ms
from fewstep.report.run_data import last_lines
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
CUT = """
(() => {
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const told = (text, why) => found.push(`${why}: ${text.trim().slice(0, 60)}`);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const own = node.parentElement;
    if (!node.data.trim()) continue;
    if (own.closest("script, style, template, option, title, .skip")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const boxes = [...range.getClientRects()].filter((box) => box.width > 1 && box.height > 1);
    if (!boxes.length || getComputedStyle(own).visibility === "hidden") continue;
    let hidden = false, scrolls = false, block = null;
    for (let up = own; up && up !== document.body; up = up.parentElement) {
      const style = getComputedStyle(up);
      hidden ||= style.clipPath !== "none" && !(up instanceof SVGElement);
      if (!block && !["inline", "contents"].includes(style.display)) block = up;
      if (up instanceof SVGElement) block = up.closest("figure") || up.closest("svg");
      if (style.overflowX === "auto" || style.overflowX === "scroll") scrolls = true;
      const box = up.getBoundingClientRect();
      if (["hidden", "clip"].includes(style.overflowX) && !(up instanceof SVGElement)
          && boxes.some((one) => one.right > box.right + 2 || one.left < box.left - 2)) {
        told(node.data, "cut off");
      }
    }
    if (hidden) continue;
    if (!scrolls && boxes.some((one) => one.right > innerWidth + 1 || one.left < -1)) {
      told(node.data, "beyond the window");
    }
    const free = block && !["auto", "scroll"].includes(getComputedStyle(block).overflowX);
    const place = free && block.getBoundingClientRect();
    if (place && boxes.some((one) => one.right > place.right + 2 || one.left < place.left - 2)) {
      told(node.data, "out of its place");
    }
  }
  return found.slice(0, 20);
})()
"""
CUT_PLANTED = """
(() => {
  const part = document.createElement("p");
  part.textContent = "planted";
  part.style.width = "12px";
  part.style.overflow = "hidden";
  document.querySelector("main").append(part);
})()
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
    parser.add_argument("--only", choices=PAGES, help="this page, beside what is known of others")
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
            found = {"axe": bool(axe), "pages": visited(home, axe, flags.pictures, flags.only)}
    known = read_json(flags.out) if flags.out.exists() else {}
    if "pages" in found and "pages" in known:
        found["pages"] = {**known["pages"], **found["pages"]}
    write_json(flags.out, {**known, **found})
    print(json.dumps(found, indent=2))


def visited(home: Path, axe: str, pictures: Path, only: str | None = None) -> dict[str, Any]:
    """What was found on each page."""
    seen = {}
    for name, (opened, visit) in PAGES.items():
        if only not in (None, name):
            continue
        with opened(home) as address:
            found = looked_at(name, address, axe, pictures)
            found["steps"], found["console"] = visit(address, home)
        seen[name] = found
        print(name, json.dumps(found), flush=True)
    return seen


@contextmanager
def served(home: Path, verb: str) -> Iterator[str]:
    """The address of a page that a verb serves."""
    with Served(home, "sid", verb=verb) as page:
        SERVING[page.address] = page
        yield page.address


@contextmanager
def in_progress(home: Path, share: float = 0.6) -> Iterator[str]:
    """The address of `fewstep watch` of a run that has come so far."""
    run = home / "going"
    shutil.copytree(home / "sid", run, ignore=shutil.ignore_patterns("student", "metrics.json"))
    last = share * read_json(run / "run.json")["run"]["steps"]
    for name in ("log.jsonl", "gauges.jsonl"):
        lines = (run / name).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= last]
        (run / name).write_text("".join(kept), encoding="utf-8")
    for picture in (run / "grids").glob("step-*.png"):
        if int(picture.stem.removeprefix("step-")) > last:
            picture.unlink()
    with Served(home, "going", verb="watch") as page:
        SERVING[page.address] = page
        yield page.address


@contextmanager
def arena(home: Path) -> Iterator[str]:
    """The address of the arena's page, made of the committed summary."""
    summary = read_json(pages.SUMMARY)
    texts = pages.arena(summary), pages.choosing(read_json(pages.CHOICES))
    out = home / "arena.html"
    out.write_text(html_page.page(summary, texts, pages.pictures(summary)), encoding="utf-8")
    yield out.as_uri()


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
    findings, seen, cut, cuts_seen = {}, [], [], []
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
                cut += [f"{width}: {one}" for one in browser.ask(CUT)]
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
                browser.ask(f"{CUT_PLANTED}; null")
                cuts_seen.append("cut off: planted" in browser.ask(CUT))
    return {
        "loads": len(loaded),
        "load_ms": round(statistics.median(loaded), 1),
        "load_ms_worst": round(max(loaded), 1),
        "load_processor_ms": round(statistics.median(busy), 1),
        "server_processor_ms": round(statistics.median(served), 1),
        "faults": faults,
        "outside_requests": away,
        "wider_than_the_window": wide,
        "cut_text": sorted(set(cut)),
        "cut_text_sees_a_planted_fault": all(cuts_seen),
        "axe_sees_a_planted_fault": all(seen) if seen else None,
        "axe_serious": {
            rule: one for rule, one in findings.items() if one["impact"] in ("serious", "critical")
        },
        "axe_other": sorted(
            rule for rule, one in findings.items() if one["impact"] not in ("serious", "critical")
        ),
    }


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


def visit_in_progress(address: str, _: Path) -> tuple[Steps, list[str]]:
    """The pictures so far come first, and the time left is told."""
    with Browser(1400, 1000) as browser:
        browser.open(address)
        text = str(browser.wait("document.getElementById('live-text').textContent"))
        first = browser.ask("Boolean(document.querySelector('#samples #frame'))")
        return {"progress in words": "%" in text, "pictures first": first}, browser.faults()


def visit_arena(address: str, _: Path) -> tuple[Steps, list[str]]:
    """Links to its parts, and tables that the keyboard scrolls."""
    with Browser(1400, 1000) as browser:
        browser.open(address)
        found = "document.getElementById(link.hash.slice(1))"
        links = f"[...document.querySelectorAll('a')].every((link) => {found})"
        done = {"links lead to its parts": browser.ask(links)}
        done["keyboard reaches a table"] = tab_to(browser, "matches('.scroll')")
        return done, browser.faults()


Visit = Callable[[str, Path], tuple[Steps, list[str]]]
PAGES: dict[str, tuple[Callable[[Path], Any], Visit]] = {
    "serve": (lambda home: served(home, "serve"), visit_playground),
    "watch": (lambda home: served(home, "watch"), visit_watch),
    "in_progress": (in_progress, visit_in_progress),
    "report": (lambda home: written(home, "report", "sid", page="sid/report.html"), visit_report),
    "compare": (
        lambda home: written(home, "compare", "sid", "sid/teacher", page="compare.html"),
        visit_compare,
    ),
    "arena": (arena, visit_arena),
}


def slowing(home: Path, pairs: int, period: int = 100) -> dict[str, Any]:
    """Processor time of a step of one training, alone and watched, in stretches that take turns.

    The watcher serves all the while, and has its page drawn before. In watched stretches a reader
    asks for the state twice a second, four times as often as a page does, and reads the page
    whenever it is new. A stretch is as many steps as lie between two looks, and neighbours are
    compared, for what else the machine does to be in both. The watcher's own processor time is
    told as a share of the watched time: on a machine without a core to spare it is taken from the
    training, up to what a low priority gets.
    """
    command = [sys.executable, "-m", "fewstep", "distill", "digits", "--teacher", "sid/teacher"]
    command += ["--out", "long", "--steps", "4000", "--batch", "64"]
    command += ["--sample-every", str(period), "--quiet"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=home, env=env)
    log = home / "long" / "log.jsonl"
    paces: dict[bool, list[float]] = {False: [], True: []}
    own: list[float] = []
    try:
        while not log.exists() or not last_lines(log):
            assert process.poll() is None
            time.sleep(0.2)
        with Served(home, "long", verb="watch") as page:
            for stretch in range(2 * pairs):
                watched = stretch % 4 in (1, 2)
                pace, share = paced(process.pid, log, page, period, watched)
                paces[watched].append(pace)
                own += [share] * watched
                print(stretch, watched, pace, share, flush=True)
    finally:
        process.kill()
        process.wait()
    changes = [b / a - 1 for a, b in zip(paces[False], paces[True], strict=True)]
    return {
        "pairs": pairs,
        "steps": period,
        "step_processor_ms_alone": [round(1000 * pace, 3) for pace in paces[False]],
        "step_processor_ms_watched": [round(1000 * pace, 3) for pace in paces[True]],
        "slower_median_percent": 100 * statistics.median(changes),
        "slower_mean_percent": 100 * statistics.fmean(changes),
        "slower_standard_error_percent": 100 * statistics.stdev(changes) / pairs**0.5,
        "watcher_percent_of_a_core": 100 * statistics.fmean(own),
    }


def paced(pid: int, log: Path, page: Served, period: int, watched: bool) -> tuple[float, float]:
    """Processor seconds of a step in one stretch, and the watcher's share of a core in it."""
    over = threading.Event()
    reader = threading.Thread(target=read, args=(page.door, over))
    if watched:
        reader.start()
        time.sleep(0.6)  # its first question
    first, used = fresh(log), processor(pid)
    began, own = time.monotonic(), processor(page.process.pid)
    while (last := fresh(log)) < first + period:
        pass
    then = processor(pid)
    share = (processor(page.process.pid) - own) / (time.monotonic() - began)
    over.set()
    if watched:
        reader.join()
    return (then - used) / (last - first), share


def fresh(log: Path) -> int:
    """The step of the next line of a log, waited for."""
    size = log.stat().st_size
    while log.stat().st_size == size:
        time.sleep(0.001)
    return int(last_lines(log)[-1]["step"])


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
