"""What a person sees, with and without a terminal."""

from __future__ import annotations

import io
import time

from rich.console import Console

from stateferry.local.child import Death
from stateferry.local.view import ClusterView

LOADING = "2026-11-23T20:18:18.541Z INFO  decode-0 wiring: loading tiny: 20 % of 0.3 MB"
DEATH = Death("decode-0", 12, -9, ("one", "two\x1b[2J"))


def show(*, terminal: bool, logs: bool) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=200, color_system=None)
    view = ClusterView(console, show_logs=logs)
    view.status("decode-0", "starting")
    view.status("decode-0", "starting")
    view.line("decode-0", LOADING)
    if terminal:
        # The live line is drawn some twelve times a second.
        time.sleep(0.3)
    view.status("decode-0", "ready")
    view.started()
    view.line("decode-0", LOADING.replace("loading tiny", "late line"))
    view.death(DEATH)
    return written.getvalue()


def test_plain_output_has_one_line_per_step() -> None:
    lines = show(terminal=False, logs=False).splitlines()
    assert lines == [
        "decode-0   | starting",
        "decode-0   | ready",
        "decode-0 (pid 12) died: killed by SIGKILL",
        "decode-0   | one",
        "decode-0   | two\ufffd[2J",
    ]


def test_logs_carry_their_process_and_are_not_said_twice() -> None:
    lines = show(terminal=False, logs=True).splitlines()
    assert f"decode-0   | {LOADING}" in lines
    assert "decode-0   | one" not in lines
    assert lines[-1] == "decode-0 (pid 12) died: killed by SIGKILL"


def test_a_terminal_sees_how_far_loading_is() -> None:
    output = show(terminal=True, logs=False)
    assert "decode-0: loading tiny: 20 % of 0.3 MB" in output
    assert "late line" not in output
    assert "\x1b[2J" not in output.rpartition("died")[2]


def test_causes_of_death_have_names() -> None:
    assert Death("x", 1, 3, ()).cause == "exit code 3"
    assert Death("x", 1, -6, ()).cause == "killed by SIGABRT"
    assert Death("x", 1, -63, ()).cause == "killed by signal 63"
