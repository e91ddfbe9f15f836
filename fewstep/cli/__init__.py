"""The command line: one module a verb, with a function `run`, imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from fewstep import __version__
from fewstep.cli import output
from fewstep.cli.parser import fail
from fewstep.signals import ended, interruptible, last_words, tolerant
from fewstep.storage.machine_errors import sentence, short_of_memory, trouble

VERBS = {
    "demo": "train a teacher on small digits, distil it to one step, measure, show: one command",
    "recipes": "list the ready-made runs",
    "plan": "tell the memory and time of each way to distil a teacher, before it is loaded",
    "train": "train a teacher by a recipe",
    "distill": "distil a teacher to a few steps by a recipe",
    "adapt": "carry a fine-tune over to a student that is already distilled",
    "sample": "make pictures with a finished model",
    "evaluate": "measure a finished run beside its teacher and real data",
    "stats": "make the reference statistics that published measures need",
    "report": "make one self-contained page of a run",
    "watch": "see a run in the browser while it trains, and what goes wrong",
    "serve": "try a student in a browser, beside its teacher, step by step",
    "compare": "put runs side by side: quality, cost, samples, settings that differ",
    "export": "write a student for other programs, such as a folder that stock diffusers loads",
    "push": "export a student and upload it to the Hugging Face hub, with its model card",
    "inspect": "tell what is inside a model file or folder, without executing any of it",
    "convert": "make a model folder of an EDM, EDM2, SiD or SiDA snapshot",
    "ema": "make a model of another average of a run's weights, after the training",
    "data": "pack pictures into one file to train on, check and show what a set holds",
    "doctor": "check the installation and the machine",
}

EPILOG = """examples:
  fewstep demo                                     the whole job in about three minutes
  fewstep train digits_teacher --out runs/teacher
  fewstep distill digits --teacher runs/teacher --out runs/sid --method.alpha 1.0
  fewstep sample runs/sid --seeds 0-63 --out digits.png
  fewstep evaluate runs/sid && fewstep report runs/sid
  fewstep watch runs/sid
  fewstep serve runs/sid
  fewstep compare runs/sid runs/dmd2
  fewstep inspect edm-cifar10-32x32-cond-vp.pkl
  fewstep convert edm-cifar10-32x32-cond-vp.pkl teachers/cifar10
  fewstep ema runs/sid --sigma-rel 0.13 --out runs/longer

'fewstep VERB --help' tells more. A run that was stopped continues with the same command.
Exit codes: 0 done, 1 failed (a full disk, say), 2 wrong input (one sentence says what to do), 75
stopped by the system and resumable, 130 stopped by Ctrl-C and resumable.
Every verb takes --json (the result as JSON, on standard output) and --quiet (no progress)."""
MEMORY = "the memory does not suffice; ask for less at once, or close other programs"


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `fewstep` command: do what is asked, and exit with its code.

    One line is said for whatever ended it early.
    """
    tolerant()
    output.begin()
    code = 1
    try:
        with interruptible():
            run, rest = _asked(sys.argv[1:] if argv is None else argv)
            code = run(rest)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read has heard enough; nothing is left to be written
        _abandon_output()
        code = 1
    except KeyboardInterrupt as stop:
        code = ended(stop)
    except OverflowError as error:
        if os.environ.get("FEWSTEP_DEBUG"):
            raise
        fail(f"a number is too large to be computed with ({error}); give a smaller one")
    except FloatingPointError as error:
        last_words(f"fewstep: {error}")
    except Exception as error:
        system, memory = trouble(error), short_of_memory(error)
        known = system or memory or isinstance(error, (ValueError, OSError))
        if os.environ.get("FEWSTEP_DEBUG") or not known:
            raise
        if not (system or memory):
            fail(sentence(error))
        _abandon_output()
        last_words(f"fewstep: {sentence(system) if system else MEMORY}")
        code = 1
    raise SystemExit(code)


def _asked(argv: list[str]) -> tuple[Callable[[list[str]], int], list[str]]:
    """The verb that is asked for, whose import takes seconds, and what it is given."""
    if not argv or argv[0] in ("-h", "--help"):
        return _overview, []
    if argv[0] in ("--version", "-V"):
        return _version, []
    if argv[0] not in VERBS:
        close = difflib.get_close_matches(argv[0], VERBS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(VERBS)}"
        fail(f"there is no verb {argv[0]!r}; {hint}")
    return importlib.import_module(f"fewstep.cli.{argv[0]}").run, argv[1:]


def _overview(_: list[str]) -> int:
    """Print what fewstep is."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {text}" for verb, text in VERBS.items())
    print("usage: fewstep VERB [options]\n")
    print("Distil a diffusion or flow model into a generator of one to four network calls.\n")
    print(f"verbs:\n{verbs}\n\n{EPILOG}")
    return 0


def _version(_: list[str]) -> int:
    """Print the version."""
    print(f"fewstep {__version__}")
    return 0


def _abandon_output() -> None:
    """Discard pending standard output that cannot be written, so that exit does not retry."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
