"""What a person sees, with and without a terminal."""

from __future__ import annotations

import io
import time

from rich.console import Console

from stateferry.local.child import Death
from stateferry.local.tables import memory_table
from stateferry.local.view import ClusterView
from stateferry.v1 import membership_pb2

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


def test_memory_is_shown_by_pool() -> None:
    pools = membership_pb2.PoolSizes(
        sequences=4,
        state_slots=9,
        tail_pages=4,
        kv_pages=100,
        kv_page_tokens=64,
        state_slot_bytes=1000,
        tail_page_bytes=500,
        kv_page_bytes=2000,
    )
    load = membership_pb2.WorkerLoad(
        state_slots_free=6,
        state_slots_total=8,
        tail_pages_free=3,
        tail_pages_total=4,
        kv_pages_free=30,
        kv_pages_total=100,
    )
    description = membership_pb2.WorkerDescription(worker_id="decode-0", pools=pools)
    pure = membership_pb2.WorkerDescription(worker_id="pure-0")
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(
        memory_table(
            [
                membership_pb2.WorkerStatus(description=description, load=load),
                membership_pb2.WorkerStatus(description=pure),
            ]
        )
    )
    lines = console.export_text().splitlines()
    [row] = [line.split() for line in lines if line.startswith("decode-0")]
    assert " ".join(row[1:]) == ("2/8 of 1.0 kB 1/4 of 500 bytes 70/100 of 2.0 kB 211.0 kB")
    [row] = [line.split() for line in lines if line.startswith("pure-0")]
    assert row[1:4] == ["-", "-", "-"]
