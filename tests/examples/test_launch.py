"""The launch files start what they say, where srun, scontrol and torchrun only write it down."""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.distributed.run import get_args_parser

from fewstep.cli import recipe_verbs
from fewstep.cli.run_flags import resolve
from fewstep.domains.prompts import Prompts
from fewstep.recipes.registry import recipe

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "examples" / "launch" / "slurm.sh"
KUBERNETES = ROOT / "examples" / "launch" / "kubernetes.yaml"
COMMAND = ("distill", "t2i", "--teacher", "sdxl", "--domain", "Prompts('two words.txt')")
STUB = """#!/bin/bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$NOTES"
printf '\\n' >> "$NOTES"
"""
NODES = "[[ $1 == show ]] && printf 'node7\\nnode8\\n'"
FINISHES = "mkdir -p runs/x/student; touch runs/x/student/manifest.json"
SAVES = "trap 'touch saved; exit 1' TERM; touch ready; while :; do sleep 0.02; done"


def stubs(home: Path, **does: str) -> None:
    """Programs on the path that write down how they are called, and then do what is given."""
    (home / "bin").mkdir()
    for name, action in does.items():
        file = home / "bin" / name
        file.write_text(f"{STUB}{action}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)


class Done(NamedTuple):
    code: int
    called: list[list[str]]
    err: str


def run(home: Path, words: Sequence[str], sends: int = 0, **more: str) -> Done:
    """What a script does in `home`; it is sent a signal when its job is ready."""
    told = {"PATH": f"{home / 'bin'}:{os.environ['PATH']}", "NOTES": str(home / "notes"), **more}
    process = subprocess.Popen(
        words, cwd=home, env={**os.environ, **told}, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while sends and not (home / "ready").exists() and time.monotonic() < end:
        time.sleep(0.01)
    if sends:
        process.send_signal(sends)
    err = process.communicate(timeout=60)[1]
    notes = (home / "notes").read_text() if (home / "notes").exists() else ""
    called = [line.split("\0")[:-1] for line in notes.splitlines()]
    return Done(process.returncode, called, err)


def slurm(home: Path, srun: str, sends: int = 0, args: Sequence[str] = COMMAND) -> Done:
    """sbatch's environment on two nodes of four GPUs, and its script."""
    stubs(home, srun=srun, scontrol=NODES)
    told = {"SLURM_JOB_ID": "4021", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    told |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_RESTART_COUNT": "1"}
    return run(home, ["bash", str(SLURM), "runs/x", *args], sends, **told)


def launched(words: Sequence[str]) -> Any:
    """The flags of torchrun, as it reads them itself; ValueError where it would not."""
    assert words[0] == "torchrun"
    return get_args_parser().parse_args(words[1:])


def accepted(words: Sequence[str]) -> Any:
    """The run of a fewstep command line."""
    assert words[0] == "distill"
    parser = recipe_verbs._recipe_parser("distill")
    flags, rest = parser.parse_known_args(words[1:])
    assert flags.device == "cuda"
    return flags, resolve(recipe(flags.recipe)(), rest, "test", parser.flags())


def test_slurm_starts_torchrun_on_all_nodes(tmp_path: Path) -> None:
    """One for each node, with its GPUs, meeting on the first; and a run that fewstep accepts."""
    done = slurm(tmp_path, FINISHES)
    assert done.code == 0, done.err
    (_, show, _, nodes), (name, kill, *words) = done.called
    assert (show, nodes) == ("show", "node[7-8]")
    assert (name, kill) == ("srun", "--kill-on-bad-exit=1")
    flags = launched(words)
    assert (flags.nnodes, flags.nproc_per_node, flags.max_restarts) == ("2", "4", 3)
    assert (flags.rdzv_backend, flags.rdzv_endpoint) == ("c10d", "node7:29021")
    assert (flags.rdzv_id, flags.module) == ("4021-1", True)
    assert "SIGUSR1" in flags.signals_to_handle
    assert flags.training_script == "fewstep"
    mine, made = accepted(flags.training_script_args)
    assert (mine.teacher, mine.out) == ("sdxl", "runs/x")
    assert made.domain == Prompts("two words.txt")


def test_slurm_saves_before_its_time_is_over_and_goes_on(tmp_path: Path) -> None:
    """SIGUSR1 to the script: SIGTERM to srun, the job is queued again, exit code 75."""
    done = slurm(tmp_path, SAVES, signal.SIGUSR1)
    assert done.code == 75, done.err
    assert (tmp_path / "saved").exists()
    assert done.called[-1] == ["scontrol", "requeue", "4021"]


def test_slurm_is_not_queued_again_by_itself_where_slurm_ends_it(tmp_path: Path) -> None:
    """SIGTERM, which Slurm sends to the steps too: exit code 75 when they have ended."""
    done = slurm(tmp_path, "touch ready; sleep 0.3; exit 1", signal.SIGTERM)
    assert done.code == 75, done.err
    assert [words[1] for words in done.called if words[0] == "scontrol"] == ["show"]


@pytest.mark.parametrize(("does", "code"), [("exit 1", 1), ("exit 137", 137)])
def test_slurm_fails_as_srun_does(does: str, code: int, tmp_path: Path) -> None:
    """And is not queued again, whatever happens as soon as it starts."""
    done = slurm(tmp_path, does)
    assert done.code == code
    assert len(done.called) == 2


def test_slurm_needs_a_run_folder_and_a_command(tmp_path: Path) -> None:
    done = slurm(tmp_path, FINISHES, args=())
    assert (done.code, done.called) == (2, [])
    assert "usage: sbatch slurm.sh RUN" in done.err


def test_what_slurm_is_asked_for() -> None:
    """One torchrun a node, told in time for a checkpoint; the script is one that bash reads."""
    text = SLURM.read_text()
    asked = dict(line.split("=", 1) for line in re.findall(r"^#SBATCH --(\S+=\S+)$", text, re.M))
    assert asked["ntasks-per-node"] == "1"
    kind, _, seconds = asked["signal"].partition("@")
    (grace,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)
    assert kind == "B:USR1"
    assert int(seconds) > int(grace)
    assert re.search(r"^#SBATCH --requeue$", text, re.M)
    subprocess.run(["bash", "-n", str(SLURM)], check=True)


def job() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Service, Job and its container."""
    yaml = pytest.importorskip("yaml")
    service, made = yaml.safe_load_all(KUBERNETES.read_text())
    (container,) = made["spec"]["template"]["spec"]["containers"]
    return service, made, container


def kubernetes(home: Path, torchrun: str, sends: int = 0) -> Done:
    """The container's command, with its variables, in `home` as its disk."""
    container = job()[2]
    stubs(home, torchrun=torchrun)
    told = {one["name"]: one["value"] for one in container["env"]}
    words = [*container["command"], *container["args"]]
    return run(home, words, sends, **{**told, "RUN": "runs/x"})


def test_kubernetes_starts_torchrun_in_all_pods(tmp_path: Path) -> None:
    """As many as there are, with their GPUs, meeting in the first under its name."""
    service, made, container = job()
    done = kubernetes(tmp_path, FINISHES)
    assert done.code == 0, done.err
    (words,) = done.called
    flags, spec = launched(words), made["spec"]
    pod = spec["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert int(flags.nnodes) == spec["completions"] == spec["parallelism"]
    assert int(flags.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    name = made["metadata"]["name"]
    (port,) = service["spec"]["ports"]
    assert flags.rdzv_endpoint == f"{name}-0.{service['metadata']['name']}:{port['port']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    assert (flags.rdzv_backend, flags.module, flags.training_script) == ("c10d", True, "fewstep")
    mine, _ = accepted(flags.training_script_args)
    assert mine.out == "runs/x"
    grace = {one["name"]: one["value"] for one in container["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(grace["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])


def test_kubernetes_saves_when_a_pod_is_ended(tmp_path: Path) -> None:
    """SIGTERM is passed on; 75, which the Job does not count as a failure."""
    done = kubernetes(tmp_path, SAVES, signal.SIGTERM)
    assert done.code == 75, done.err
    assert (tmp_path / "saved").exists()
    _, made, container = job()
    assert made["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # else there is no policy
    rules = made["spec"]["podFailurePolicy"]["rules"]
    (ignored,) = (rule["onExitCodes"] for rule in rules if "onExitCodes" in rule)
    assert ignored == {"containerName": container["name"], "operator": "In", "values": [75]}


def test_kubernetes_fails_as_torchrun_does(tmp_path: Path) -> None:
    assert kubernetes(tmp_path, "exit 3").code == 3


def test_the_page_tells_the_same_commands() -> None:
    """The example in the script is the one in docs/scale.md."""
    (line,) = re.findall(r"^#   (sbatch .*)$", SLURM.read_text(), re.M)
    assert shlex.split(line)[:3] == ["sbatch", "--nodes=8", "slurm.sh"]
    assert line.replace("slurm.sh", "examples/launch/slurm.sh") in (
        ROOT / "docs" / "scale.md"
    ).read_text(encoding="utf-8")
