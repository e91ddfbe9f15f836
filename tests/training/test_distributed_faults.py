"""Two processes under the command line, and what befalls one of them: no hang, no lost step.

Each test ends with the same command again, and with the bits of a run that nothing befell.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.cli import recipe_run, run_flags
from fewstep.cli.progress_bar import stopping
from fewstep.data.batches import Latents
from fewstep.runs.monitor import Monitor
from fewstep.storage import checkpoint
from fewstep.storage.files import unpack
from fewstep.training import distributed
from fewstep.training.loop import State
from tests.command import Result, bits, fewstep, tree
from tests.processes import Ended, free_port, results, together

pytestmark = pytest.mark.slow

PRELOADED = (run_flags, recipe_run)  # forked processes need not import them again
SMOOTH = "Optim(lr=1e-2, betas=(0.9, 0.99), eps=1e-3)"
SMALL = ("--model.net.width", "16", "--model.net.blocks", "1", "--batch", "16")
STEPS = ("--steps", "12", "--save-every", "4", "--sample-every", "12")
ARGS = ("distill", "mixture", *SMALL, *STEPS, "--optim", SMOOTH, "--out", "run")
STUDENT = Path("run/student/model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder where two processes ran to the end."""
    home = tmp_path_factory.mktemp("two")
    assert codes(together(2, home, command, home)) == [0, 0]
    return home


def look(self: Monitor, state: State) -> None:
    """Quicker than the gauges of a thousand samples."""
    if self.writes:
        self.folder.append("gauges.jsonl", {"step": state.step})


def command(
    home: Path, fault: Callable[[int], None] | None = None, *more: str, looking: Any = look
) -> Result:
    """The command in `home`, in a rank; `fault(step)` is called after each step."""
    os.chdir(home)
    Monitor.look = looking  # type: ignore[method-assign]
    if fault is not None:
        after = fault
        ready, steps = distributed.heartbeat, iter(range(1, 99))

        def alive() -> None:
            ready()
            after(next(steps))

        distributed.heartbeat = alive  # type: ignore[assignment]
    result = fewstep(*ARGS, *more)
    print(result.err, file=sys.stderr)
    if result.code:
        raise SystemExit(result.code)
    return result


def codes(ended: list[Ended]) -> list[int]:
    return [end.code for end in ended]


def finishes(home: Path, undisturbed: Path, step: int) -> None:
    """The same command continues from `step` to the undisturbed run's bits."""
    first, second = results(2, home, command, home)
    assert f"continuing from step {step} of 12" in first.err.splitlines()
    assert second.err == ""
    assert (home / STUDENT).read_bytes() == (undisturbed / STUDENT).read_bytes()
    newest = checkpoint.find_checkpoints(home / "run/checkpoints")[-1]
    assert bits(newest) == bits(undisturbed / "run/checkpoints/step-00000012")
    log = [json.loads(line)["step"] for line in (home / "run/log.jsonl").read_text().splitlines()]
    assert log == list(range(1, 13))


def test_two_processes_leave_the_folder_of_one(undisturbed: Path, tmp_path: Path) -> None:
    """The same files, each line once; weights within rounding."""
    (one,) = results(1, tmp_path, command, tmp_path)
    assert one.err == "mixture: 12/12, 0 s left\nfinished: run\n"
    assert tree(tmp_path / "run").keys() == tree(undisturbed / "run").keys()
    for name in ("log.jsonl", "gauges.jsonl"):
        logs = [(home / "run" / name).read_text().splitlines() for home in (tmp_path, undisturbed)]
        steps = [[json.loads(line)["step"] for line in log] for log in logs]
        assert steps[0] == steps[1]
    ours, theirs = unpack(undisturbed / STUDENT), unpack(tmp_path / STUDENT)
    far = [float((ours[name] - theirs[name]).abs().max()) for name in ours]
    assert 0 < max(far) < 1e-6
    assert codes(together(2, tmp_path, command, undisturbed)) == [0, 0]  # finished already


def sends(rank: int, number: int) -> Callable[[int], None]:
    def fault(step: int) -> None:
        if step == 6 and distributed.rank() == rank:
            while not checkpoint.find_checkpoints(Path("run/checkpoints")):  # a thread writes it
                time.sleep(0.01)
            os.kill(os.getpid(), number)

    return fault


@pytest.mark.parametrize(
    ("number", "rank", "code"),
    [(signal.SIGTERM, 1, 75), (signal.SIGUSR1, 0, 75), (signal.SIGINT, 1, 130)],
)
def test_a_signal_to_one_stops_all_at_the_same_step(
    number: int, rank: int, code: int, undisturbed: Path, tmp_path: Path
) -> None:
    ended = together(2, tmp_path, command, tmp_path, sends(rank, number))
    assert codes(ended) == [code, code]
    told = "stopped at step 6 of 12, saved in run; continue with: fewstep distill mixture"
    assert told in ended[0].err
    names = [path.name for path in checkpoint.find_checkpoints(tmp_path / "run/checkpoints")]
    assert names == ["step-00000004", "step-00000006"]
    finishes(tmp_path, undisturbed, 6)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_process_is_noticed(rank: int, undisturbed: Path, tmp_path: Path) -> None:
    """Within 10 seconds the other says so and ends; the step of the last checkpoint is kept."""
    ended = together(2, tmp_path, command, tmp_path, sends(rank, signal.SIGKILL), within=10)
    other = ended[1 - rank]
    assert codes(ended)[rank] == -signal.SIGKILL
    assert other.code == 1
    assert f"fewstep: process {1 - rank} lost another one (" in other.err
    assert "run the same command again to continue from the last checkpoint" in other.err
    assert "Traceback" not in other.err
    finishes(tmp_path, undisturbed, 4)


def hangs_here(step: int) -> None:
    if step == 6 and distributed.rank() == 1:
        time.sleep(600)


def test_a_hanging_process_is_noticed(undisturbed: Path, tmp_path: Path) -> None:
    """After --timeout both tell where they are, the culprit too, and end."""
    fault = (hangs_here, "--timeout", "1")
    ended = together(2, tmp_path, command, tmp_path, *fault, within=10)
    assert codes(ended) == [1, 1]
    for end in ended:
        assert "Timeout (0:00:01)!" in end.err
    assert "in hangs_here" in ended[1].err
    assert "all_reduce" in ended[0].err
    finishes(tmp_path, undisturbed, 4)


def altered(home: Path) -> Result:
    """The lowest bit of one weight of the fake score flips on rank 1, after step 5."""
    held: list[State] = []
    init = State.init

    def noting(*args: Any) -> State:
        held.append(init(*args))
        return held[-1]

    def flip(step: int) -> None:
        if step == 5 and distributed.rank() == 1:
            weight = held[0].nets.get_parameter("fake.net.first.weight")
            weight.data.view(torch.int32)[0, 0] ^= 1

    State.init = noting  # type: ignore[method-assign, assignment]
    return command(home, flip)


def test_an_altered_replica_is_noticed(undisturbed: Path, tmp_path: Path) -> None:
    """Before the next checkpoint, which is not written."""
    ended = together(2, tmp_path, altered, tmp_path)
    assert codes(ended) == [1, 1]
    for end in ended:
        sentence = "fewstep: the processes hold different numbers in nets.fake.net.first.weight "
        assert f"{sentence}at step 8: processes 0 and 1 differ; " in end.err
    names = [path.name for path in checkpoint.find_checkpoints(tmp_path / "run/checkpoints")]
    assert names == ["step-00000004"]
    finishes(tmp_path, undisturbed, 4)


def odd_one() -> str:
    with distributed.process_group():
        found = torch.zeros(3)
        distributed.require_equal_ranks({"a": torch.ones(2), "b": found}, "at first")
        if distributed.rank() == 2:
            found[1] = -0.0
        try:
            distributed.require_equal_ranks({"a": torch.ones(2), "b": found}, "now")
        except distributed.RanksDiffer as error:
            return str(error)
    return ""


def test_the_odd_one_of_three_is_named(tmp_path: Path) -> None:
    """By the sign of a zero."""
    for text in results(3, tmp_path, odd_one):
        assert text.startswith("the processes hold different numbers in b now: process 2 differs")


def broken(home: Path) -> Result:
    """The data of rank 1 hold a NaN in one batch."""
    call = Latents.__call__

    def poisoned(self: Latents, draws: Any) -> Any:
        batch = call(self, draws)
        if 5 * 16 in draws.index.tolist() or 5 * 16 + 8 in draws.index.tolist():
            batch.z[0] *= float("nan") if distributed.rank() == 1 else 1.0
        return batch

    Latents.__call__ = poisoned  # type: ignore[method-assign]
    return command(home)


def test_what_is_not_finite_on_one_is_skipped_on_all(tmp_path: Path) -> None:
    """The student's turn of step 3; the replicas are compared at every checkpoint after it."""
    results(2, tmp_path, broken, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in log] == [0.0] * 2 + [1.0] * 10
    assert [line["images"] for line in log] == [16, 32, *(16 * k for k in range(2, 12))]
    assert log[2]["student/loss"] == "nan"
    assert isinstance(log[2]["fake/loss"], float)


def test_a_refusal_is_everybodys(undisturbed: Path) -> None:
    """Rank 0 alone reads the folder; all say the same and end with code 2."""
    before = tree(undisturbed / "run")
    ended = together(2, undisturbed.parent, command, undisturbed, None, "--seed", "4")
    assert codes(ended) == [2, 2]
    sentence = "fewstep: run is in use by a run with other settings (run.seed was 0, now 4)"
    assert all(sentence in end.err for end in ended)
    assert tree(undisturbed / "run") == before
    other = ("--out", "other", "--batch", "15")
    ended = together(2, undisturbed.parent, command, undisturbed, None, *other)
    assert codes(ended) == [2, 2]
    sentence = "fewstep: batch 15 must be a positive multiple of accumulate 1 x 2 processes"
    assert all(sentence in end.err for end in ended)
    assert not (undisturbed / "other").exists()
    if not torch.cuda.is_available():
        other = ("--out", "other", "--device", "cuda")
        ended = together(2, undisturbed.parent, command, undisturbed, None, *other)
        assert codes(ended) == [2, 2]
        for rank, end in enumerate(ended):
            assert f"fewstep: this machine has no device 'cuda:{rank}'; leave" in end.err


def test_a_launcher_may_repeat_its_signal() -> None:
    """A terminal's Ctrl-C comes twice under torchrun: once of its own, once of the launcher."""
    with stopping(launched=True) as stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.signal == signal.SIGTERM
        assert (stop.code(signal.SIGTERM), stop.code(signal.SIGINT)) == (75, 130)


def test_torchrun_stops_saved(tmp_path: Path) -> None:
    """SIGTERM to the launcher: it ends with code 1, as it does, and no step is lost."""
    port, out = str(free_port()), tmp_path / "run"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port)
    more = ("--steps", "5000", "--sample-every", "5000", "--save-every", "5000", "--out", str(out))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "err").open("w") as err:
        run = subprocess.Popen(
            [sys.executable, *launcher, "-m", "fewstep", *ARGS, *more], stderr=err, env=environment
        )
        for _ in range(4000):
            time.sleep(0.05)
            if (out / "log.jsonl").exists() and len((out / "log.jsonl").read_text()) > 2000:
                break
        run.terminate()
        assert run.wait(120) == 1
    told = (tmp_path / "err").read_text()
    assert told.count("stopped at step") == 1
    (saved,) = checkpoint.find_checkpoints(out / "checkpoints")
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert 0 < last < 5000
    assert last <= int(saved.name.removeprefix("step-")) < last + 10  # every tenth is logged
    facts: dict[str, Tensor] = unpack(saved / "nets.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in facts.values())
