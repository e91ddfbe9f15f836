"""Verbs that serve a page: what they refuse, and how they end."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

import pytest

from fewstep.cli.web_server import require_server, serve_page, server_flags
from fewstep.signals import Stopped
from fewstep.web import shell


def test_flags_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    server_flags(parser)
    assert vars(parser.parse_args(["--port", "7"])) == {"port": 7, "open": False}
    require_server("watch", 65535)
    with pytest.raises(SystemExit, match="2"):
        require_server("watch", 65536)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        require_server("watch", 0)


@pytest.mark.parametrize("stop", [Stopped, KeyboardInterrupt])
def test_a_signal_ends_it_and_ctrl_c_is_told(
    monkeypatch: pytest.MonkeyPatch, stop: type[KeyboardInterrupt]
) -> None:
    def ends(application: Any, port: int, ready: Any) -> None:
        assert (application(None), port) == ("app", 7)
        raise stop(15) if stop is Stopped else stop

    monkeypatch.setattr(shell, "serve", ends)
    flags = argparse.Namespace(port=7, open=False)
    if stop is Stopped:
        assert serve_page(lambda: "app", flags, "it") == 0  # type: ignore[arg-type, return-value]
    else:
        with pytest.raises(KeyboardInterrupt):
            serve_page(lambda: "app", flags, "it")  # type: ignore[arg-type, return-value]
