"""Several ranks on this machine, as torchrun would start them, forked from the test itself."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo  # optimisers import it: seconds, saved in every forked process


class Ended(NamedTuple):
    """How a process ended: its exit code (-9: killed), what it returned, what it wrote."""

    code: int
    result: Any
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _child(rank: int, function: Callable[..., Any], args: tuple[Any, ...], told: Any) -> None:
    environment, err, pipe = told
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    with err.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)  # a forked process must not use the parent's pool
    code = 0
    try:
        pipe.send_bytes(pickle.dumps(function(*args)))
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stderr.flush()
    os._exit(code)


def together(
    size: int, folder: Path, function: Callable[..., Any], *args: Any, within: float = 60
) -> list[Ended]:
    """Call `function(*args)` in `size` ranks; all must end `within` so many seconds."""
    context = multiprocessing.get_context("fork")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**address, "WORLD_SIZE": str(size)} if size > 1 else {}
    ranks: list[tuple[Any, Connection, Path]] = []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        err = folder / f"stderr-{rank}"
        told = (environment, err, theirs)
        process = context.Process(target=_child, args=(rank, function, args, told))
        process.start()
        theirs.close()
        ranks.append((process, ours, err))
    ended = []
    for process, pipe, err in ranks:
        result = None
        if pipe.poll(within):
            try:
                result = pickle.loads(pipe.recv_bytes())
            except EOFError:
                result = None
        process.join(within)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        assert not late, f"a rank did not end within {within} s: {err.read_text()}"
        ended.append(Ended(process.exitcode, result, err.read_text()))
    return ended


def results(
    size: int, folder: Path, function: Callable[..., Any], *args: Any, **options: float
) -> list[Any]:
    """What `function` returned on each rank; none of them may fail."""
    ended = together(size, folder, function, *args, **options)
    for rank, end in enumerate(ended):
        assert end.code == 0, f"rank {rank} ended with {end.code}: {end.err}"
    return [end.result for end in ended]
