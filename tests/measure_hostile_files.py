"""Hands strangers' files to fewstep, one after the other in this process, and measures each.

    python -m tests.measure_hostile_files [MOST_OF_A_KIND]

Of each file the report, JSON on standard output, says how it ended, the seconds of work, which do
not depend on what else the machine does, and by how many bytes the memory of the process grew at
its height: the kernel's high-water mark, set back before each file. The address space is limited,
so that what asks for everything ends here and not in the machine's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from tests.strangers_files import Case, cases

SPACE = 6 << 30
"""Bytes of address space beyond those of the start."""
LIMIT, HANGING = 20, 120
"""Seconds of work after which a file is given up, and of waiting."""


class Late(BaseException):
    """Raised by the alarm; nothing catches it on the way."""


def _status(name: str) -> int:
    """A number of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _enter(words: tuple[str, ...]) -> None:
    """What a person would do with the file."""
    from fewstep import cli
    from fewstep.data.captions import open_captions
    from fewstep.data.prompts import read_prompts
    from fewstep.eval.features import Features
    from fewstep.eval.reference import read_reference
    from fewstep.safe_pickle.state_dicts import read_state

    class Own(Features):
        name, dim = "inception", 3

    if words[0] == "prompts":
        read_prompts(words[1])
    elif words[0] == "captions":
        open_captions(words[1])
    elif words[0] == "state":
        read_state(Path(words[1]))
    elif words[0] == "reference":
        read_reference(Path(words[1]), Own())  # type: ignore[abstract]
    else:
        cli.main(list(words))


def _outcome(words: tuple[str, ...]) -> tuple[str, str]:
    """ "taken", "refused" in one sentence, or what else happened; and what was said."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            _enter(words)
    except SystemExit as stop:
        last = err.getvalue().rstrip("\n").rpartition("\n")[2]
        if stop.code == 2 and last.startswith("fewstep: "):
            return "refused", last
        return ("taken" if not stop.code else f"exit {stop.code}"), err.getvalue()
    except (ValueError, OSError) as error:  # which the command line turns into a sentence
        return ("refused" if "\n" not in str(error) else "several lines"), str(error)
    except Late:
        return "late", ""
    except BaseException:
        return "trouble", traceback.format_exc()[-1500:]
    return "taken", out.getvalue()


def measured(case: Case, home: Path) -> dict[str, Any]:
    """One file: made, handed over, measured."""
    words = case.make(home)
    size = sum(p.lstat().st_size for p in home.rglob("*") if p.is_file() and not p.is_symlink())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _status("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    signal.alarm(HANGING)
    outcome, said = _outcome(words)
    signal.alarm(0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return {
        "kind": case.kind,
        "name": case.name,
        "fits": case.fits,
        "outcome": outcome,
        "said": said[:400] if outcome == "refused" else said[-1500:],
        "bytes": size,
        "seconds": time.process_time() - began,
        "grown": _status("VmHWM") - before,
    }


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Late


def main(most: int) -> None:
    """Measure the first `most` files of each kind."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _alarm)
    home = Path(tempfile.mkdtemp()).resolve()
    os.environ["XDG_CACHE_HOME"] = str(home)
    os.chdir(home)
    for case in cases():
        if case.kind == "controls":  # which import what is imported late
            _outcome(case.make(Path(tempfile.mkdtemp(dir=home))))
    gc.collect()
    gc.freeze()  # to look through all of torch before each file takes longer than the file
    total = _status("VmSize") + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (total, total))
    counts: Counter[str] = Counter()
    report = []
    try:
        for case in cases():
            counts[case.kind] += 1
            if counts[case.kind] > most and case.kind != "controls":
                continue
            place = Path(tempfile.mkdtemp(dir=home))
            report.append(measured(case, place))
            shutil.rmtree(place, ignore_errors=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else sys.maxsize)
