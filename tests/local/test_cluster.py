"""The supervisor: readiness, deaths, stopping, and what happens when it dies itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stateferry.core.errors import Unavailable
from stateferry.local import Death, LocalCluster

NewCluster = Callable[..., LocalCluster]
HERE = Path(__file__).parent


def is_alive(pid: int) -> bool:
    """Whether ``pid`` runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def test_start_and_stop(new_cluster: NewCluster) -> None:
    with new_cluster() as cluster:
        pids = dict(cluster.pids)
        assert set(pids) == {"router", "prefill-0", "decode-0", "decode-1"}
        assert cluster.router_address == f"127.0.0.1:{pids['router']}"
        assert all(is_alive(pid) for pid in pids.values())
        assert cluster.num_running == 4
        # Ctrl-C on a terminal reaches a whole process group: ours must not include them.
        assert all(os.getpgid(pid) != os.getpgid(0) for pid in pids.values())
    for pid in pids.values():
        # Reaped, not only dead: no zombie is left.
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert cluster.deaths == ()


async def test_start_and_stop_inside_an_event_loop(new_cluster: NewCluster) -> None:
    async with new_cluster() as cluster:
        pids = list(cluster.pids.values())
        assert all(is_alive(pid) for pid in pids)
    assert not any(is_alive(pid) for pid in pids)


def test_children_get_settings_key_and_environment(
    new_cluster: NewCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATEFERRY_WORKER_MAX_REQUESTS", "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with new_cluster() as cluster:
        seen = cluster.addresses
    router, worker = seen["router"], seen["decode-1"]
    assert worker["STATEFERRY_WORKER_ID"] == "decode-1"
    assert worker["STATEFERRY_CLUSTER_ROUTERS"] == cluster.router_address
    assert len(router["STATEFERRY_CLUSTER_KEY"]) >= 32
    assert worker["STATEFERRY_CLUSTER_KEY"] == router["STATEFERRY_CLUSTER_KEY"]
    assert worker["STATEFERRY_WORKER_WORKERS_PER_MACHINE"] == str(len(seen) - 1)
    assert worker["STATEFERRY_WORKER_STEP_NICE"] == "15"
    assert seen["prefill-0"]["STATEFERRY_WORKER_STEP_NICE"] == "0"
    assert worker["OMP_NUM_THREADS"] == "1"
    assert worker["MALLOC_ARENA_MAX"] == "2"
    # The user's own choice stays; a setting of ours comes from the configuration alone.
    assert worker["OMP_WAIT_POLICY"] == "active"
    assert "STATEFERRY_WORKER_MAX_REQUESTS" not in worker


@pytest.mark.parametrize("nice", [0, 3])
def test_a_niceness_that_is_given_is_kept(new_cluster: NewCluster, nice: int) -> None:
    with new_cluster({"settings": {"worker.step_nice": nice}}) as cluster:
        for name in ("prefill-0", "decode-0"):
            assert cluster.addresses[name]["STATEFERRY_WORKER_STEP_NICE"] == str(nice)


def test_a_key_that_is_given_is_kept(new_cluster: NewCluster) -> None:
    with new_cluster({"settings": {"cluster.key": "k" * 20}}) as cluster:
        assert cluster.addresses["router"]["STATEFERRY_CLUSTER_KEY"] == "k" * 20


def test_it_waits_until_the_router_sees_every_worker(new_cluster: NewCluster) -> None:
    answers = [frozenset({"prefill-0"}), frozenset({"prefill-0", "decode-0"})]
    everyone = frozenset({"prefill-0", "decode-0", "decode-1"})
    statuses: list[tuple[str, str]] = []
    options: dict[str, Any] = {
        "roster": lambda address: answers.pop(0) if answers else everyone,
        "on_status": lambda name, text: statuses.append((name, text)),
    }
    with new_cluster(options):
        assert not answers
    assert statuses.index(("decode-1", "ready")) < statuses.index(("decode-1", "joined"))


def test_a_death_is_reported_and_the_rest_goes_on(new_cluster: NewCluster) -> None:
    deaths: list[Death] = []
    with new_cluster({"on_death": deaths.append}) as cluster:
        pid = cluster.pids["decode-0"]
        began_s = time.monotonic()
        cluster.kill("decode-0")
        assert cluster.wait_dead("decode-0", 5.0)
        assert time.monotonic() - began_s < 2.0
        assert cluster.num_running == 3
    (death,) = deaths
    assert cluster.deaths == (death,)
    assert (death.name, death.pid, death.returncode) == ("decode-0", pid, -signal.SIGKILL)
    assert str(death) == f"decode-0 (pid {pid}) died: killed by SIGKILL"
    assert death.last_lines == ("decode says hello",)


def test_lines_carry_their_child(new_cluster: NewCluster) -> None:
    lines: list[tuple[str, str]] = []
    with new_cluster({"on_line": lambda name, line: lines.append((name, line))}):
        assert wait_until(lambda: len(lines) == 4)
    assert set(lines) >= {("router", "router says hello"), ("decode-1", "decode says hello")}


def test_a_child_that_cannot_start_is_named_with_its_last_lines(new_cluster: NewCluster) -> None:
    cluster = new_cluster(prefill="crash")
    with pytest.raises(Unavailable) as caught:
        cluster.start()
    text = str(caught.value)
    assert text.startswith("prefill-0 (pid ") and "exit code 3" in text
    assert text.endswith("prefill says hello\nfirst reason\nlast reason")
    assert not any(is_alive(pid) for pid in cluster.pids.values())


def test_a_child_that_is_never_ready_is_named(new_cluster: NewCluster) -> None:
    cluster = new_cluster(router="silent")
    with pytest.raises(Unavailable, match="router was not ready in time"):
        cluster.start(timeout_s=0.3)
    assert cluster.num_running == 0


def test_a_stubborn_child_is_killed_after_the_grace(new_cluster: NewCluster) -> None:
    cluster = new_cluster(decode="stubborn")
    cluster.start()
    pids = list(cluster.pids.values())
    began_s = time.monotonic()
    cluster.stop(grace_s=0.5)
    assert 0.4 < time.monotonic() - began_s < 8.0
    assert not any(is_alive(pid) for pid in pids)
    assert cluster.deaths == ()


def test_a_stopped_process_is_killed_too(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    cluster.start()
    pid = cluster.pids["decode-0"]
    cluster.kill("decode-0", signal.SIGSTOP)
    cluster.stop(grace_s=0.3)
    assert not is_alive(pid)


def test_a_start_can_be_abandoned(new_cluster: NewCluster) -> None:
    cluster = new_cluster(decode="silent")
    timer = threading.Timer(0.7, cluster.abandon)
    timer.start()
    with pytest.raises(Unavailable, match="stopped while starting"):
        cluster.start(timeout_s=30.0)
    timer.join()
    assert cluster.num_running == 0


def test_no_file_is_left(new_cluster: NewCluster) -> None:
    with new_cluster() as cluster:
        folder = cluster.ready_directory
        assert folder.is_dir()
    assert not folder.exists()
    # One that was never started makes none.
    new_cluster()


PARENT = """
import sys, time
sys.path.insert(0, {here!r})
from conftest import stub_command
from stateferry.config import load_config
from stateferry.local import LocalCluster
cluster = LocalCluster(load_config(environ={{}}), command=stub_command({{}}),
                       roster=lambda address: frozenset({{"prefill-0", "decode-0"}}))
cluster.start()
print(*cluster.pids.values(), flush=True)
time.sleep(60)
"""


def test_children_die_with_a_killed_supervisor() -> None:
    code = PARENT.format(here=str(HERE))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            pids = [int(word) for word in parent.stdout.readline().split()]
            assert len(pids) == 3 and all(is_alive(pid) for pid in pids)
        finally:
            parent.kill()
            parent.wait()
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids), timeout_s=2.0)


def test_a_child_whose_supervisor_is_already_gone_leaves() -> None:
    code = "from stateferry.local.lifeline import die_with_parent; die_with_parent(1 << 22)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is gone" in done.stderr
