"""Real UCX between two processes, and what is left when one of them is killed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.ucx,
    pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed"),
]

PEER = Path(__file__).with_name("ucx_peer.py")
ROOT = Path(__file__).parents[2]
SMALL_BYTES = 1_400_003
BIG_BYTES = 64 << 20
START_S = 30.0


class Peer:
    """A child process that speaks JSON lines."""

    def __init__(self, *arguments: str) -> None:
        paths = [str(ROOT / "services"), str(ROOT / "kernels")]
        self.process = subprocess.Popen(
            [sys.executable, str(PEER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._kept: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.put(json.loads(line))

    def tell(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def wait(self, key: str, value: Any = None, timeout_s: float = 10.0) -> dict[str, Any]:
        """The next event that has ``key``, with ``value`` if given. Others are kept for later."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            for event in self._kept:
                if key in event and value in (None, event[key]):
                    self._kept.remove(event)
                    return event
            try:
                self._kept.append(self._events.get(timeout=deadline_s - time.monotonic()))
            except (queue.Empty, ValueError):
                raise AssertionError(f"no {key} {value}, but {self._kept}") from None

    def kill(self) -> float:
        """SIGKILL. Returns when, in wall-clock seconds."""
        at_s = time.time()
        self.process.send_signal(signal.SIGKILL)
        self.close()
        return at_s

    def close(self, timeout_s: float = 10.0) -> int:
        """End of input; the process must end by itself. Returns its exit code."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(5.0)
            self.process.stdout.close()


class Starter:
    """Starts peers and remembers them."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []

    def __call__(self, *arguments: str) -> Peer:
        self.peers.append(Peer(*arguments))
        return self.peers[-1]


@pytest.fixture
def start() -> Iterator[Starter]:
    """Starts peers; those that no test killed must end by themselves, with code 0."""
    starter = Starter()
    yield starter
    codes = [peer.close() for peer in starter.peers]
    assert set(codes) <= {0, -signal.SIGKILL}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Peer]:
    """Lives through all that happens to its senders, and leaks nothing."""
    peer = Peer("uvloop", "receiver")
    yield peer
    deadline_s = time.monotonic() + 5.0
    while True:
        peer.tell(do="snapshot")
        snapshot = peer.wait("staging_in_use_bytes")
        if not any(snapshot.values()) or time.monotonic() > deadline_s:
            break
        time.sleep(0.05)
    # ucxx keeps the exceptions it raised; their frames must not keep our links and buffers.
    assert snapshot == {"staging_in_use_bytes": 0, "connections": 0, "links": 0}
    assert peer.close() == 0


@pytest.fixture(scope="module")
def started(receiver: Peer) -> dict[str, Any]:
    """What the receiver said when it began to listen."""
    return receiver.wait("address", timeout_s=START_S)


@pytest.fixture(scope="module")
def address(started: dict[str, Any]) -> str:
    return str(started["address"])


@pytest.fixture(scope="module")
def sender(receiver: Peer) -> Iterator[Peer]:
    """Lives through all that happens to its receivers."""
    peer = Peer("uvloop", "sender", "steady")
    peer.wait("ready", timeout_s=START_S)
    yield peer
    assert peer.close() == 0


def expect(receiver: Peer, rid: str, sender: str = "steady") -> None:
    receiver.tell(do="expect", rid=rid, sender=sender, max_bytes=BIG_BYTES)
    receiver.wait("expecting", rid)


def check_handoff(
    receiver: Peer,
    sender: Peer,
    address: str,
    rid: str,
    size_bytes: int = SMALL_BYTES,
    name: str = "steady",
) -> None:
    expect(receiver, rid, name)
    sender.tell(do="push", address=address, rids=[rid], size_bytes=size_bytes)
    pushed, sealed = sender.wait("pushed"), receiver.wait("sealed", rid)
    assert pushed["digest"] == sealed["digest"]
    assert pushed["transport"] == sealed["transport"] == "ucx"
    assert pushed["size_bytes"] == sealed["size_bytes"] == size_bytes
    assert sealed["payload"] == "payload"


@pytest.mark.parametrize("size_bytes", [1, SMALL_BYTES, BIG_BYTES])
def test_bytes_arrive_over_ucx(receiver: Peer, sender: Peer, address: str, size_bytes: int) -> None:
    check_handoff(receiver, sender, address, f"size-{size_bytes}", size_bytes)


def test_receiver_says_which_transports_it_has(started: dict[str, Any]) -> None:
    version, transports = started["describe"].split(": ")
    assert version.startswith("ucx 1.")
    assert {"tcp", "cma", "posix"} <= set(transports.split(", "))


def test_idle_connections_cost_little(receiver: Peer, sender: Peer, address: str) -> None:
    check_handoff(receiver, sender, address, "idle")
    receiver.tell(do="idle", seconds=1.0)
    assert receiver.wait("cpu_share")["cpu_share"] < 0.25


def test_the_plain_event_loop_and_a_process_that_forgets_to_close(
    receiver: Peer, address: str, start: Starter
) -> None:
    crasher = start("asyncio", "sender", "crasher")
    crasher.wait("ready", timeout_s=START_S)
    check_handoff(receiver, crasher, address, "before-crash", name="crasher")
    crasher.tell(do="crash")
    assert crasher.close() == 3
    start.peers.remove(crasher)


@pytest.mark.parametrize("stall_at", [2, 4])
def test_sender_killed_in_the_middle_of_a_push(
    receiver: Peer, sender: Peer, address: str, start: Starter, stall_at: int
) -> None:
    """Before the first DATA message (0 is HELLO, 1 is PUSH), and between two of them."""
    name = f"victim-{stall_at}"
    victim = start("uvloop", "sender", name)
    victim.wait("ready", timeout_s=START_S)
    expect(receiver, name, name)
    victim.tell(do="push", address=address, rids=[name], size_bytes=BIG_BYTES, stall_at=stall_at)
    victim.wait("stalled")
    killed_at_s = victim.kill()
    failed = receiver.wait("failed", name)
    assert failed["error"] == "PeerLost"
    # Well below the progress deadline of 2 s: UCX itself noticed.
    assert failed["at_s"] - killed_at_s < 1.5
    check_handoff(receiver, sender, address, f"after-{name}")


def test_senders_killed_at_any_moment(
    receiver: Peer, sender: Peer, address: str, start: Starter
) -> None:
    """No stall: the kill hits whatever is going on among 64 MiB pushes."""
    victims = {name: start("uvloop", "sender", name) for name in ("random-1", "random-2")}
    for delay_s, (name, victim) in zip((0.03, 0.1), victims.items(), strict=True):
        victim.wait("ready", timeout_s=START_S)
        rids = [f"{name}-{n}" for n in range(40)]
        for rid in rids:
            expect(receiver, rid, name)
        victim.tell(do="push", address=address, rids=rids, size_bytes=BIG_BYTES)
        receiver.wait("sealed", rids[0])
        time.sleep(delay_s)
        victim.kill()
    check_handoff(receiver, sender, address, "after-random", BIG_BYTES)


def test_connects_given_up_at_any_moment(
    receiver: Peer, sender: Peer, address: str, start: Starter
) -> None:
    """ucxx frees a buffer under UCX when a connect is cancelled: this used to end in SIGSEGV."""
    stormy = start("uvloop", "sender", "stormy")
    stormy.wait("ready", timeout_s=START_S)
    stormy.tell(do="storm", address=address, connects=200)
    outcomes = stormy.wait("storm", timeout_s=30.0)["storm"]
    assert outcomes["given_up"] > 20
    check_handoff(receiver, stormy, address, "after-storm", name="stormy")
    check_handoff(receiver, sender, address, "beside-storm")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_receiver_killed_or_hung(sender: Peer, start: Starter, how: signal.Signals) -> None:
    receiver = start("uvloop", "receiver")
    address = receiver.wait("address", timeout_s=START_S)["address"]
    rids = [f"r{n}" for n in range(60)]
    for rid in rids:
        expect(receiver, rid)
    sender.tell(do="push", address=address, rids=rids, size_bytes=BIG_BYTES)
    receiver.wait("sealed", rids[0])
    hit_at_s = time.time()
    receiver.process.send_signal(how)
    failed = sender.wait("failed")
    assert failed["error"] == "PeerLost"
    assert failed["at_s"] - hit_at_s < (1.5 if how is signal.SIGKILL else 3.5)
    for rid in ("again", "and again"):
        sender.tell(do="push", address=address, rids=[rid], size_bytes=SMALL_BYTES)
        assert sender.wait("failed", rid)["error"] == "PeerLost"
    receiver.kill()


def test_garbage_over_plain_tcp(sender: Peer, start: Starter) -> None:
    """On a receiver of its own: UCX 1.21 keeps a thread spinning after the longest of these."""
    receiver = start("uvloop", "receiver")
    address = receiver.wait("address", timeout_s=START_S)["address"]
    host, port = address.rsplit(":", 1)
    for garbage in (b"", b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000)):
        with socket.create_connection((host, int(port)), timeout=2.0) as connection:
            connection.sendall(garbage)
    check_handoff(receiver, sender, address, "after-garbage")


def test_garbage_and_cut_messages_of_a_ucx_peer(sender: Peer, start: Starter) -> None:
    receiver = start("uvloop", "receiver")
    address = receiver.wait("address")["address"]
    attacker = start("uvloop", "sender", "prefill-9")
    attacker.wait("ready")
    attacker.tell(do="garbage", address=address)
    sent = attacker.wait("garbage", timeout_s=60.0)["garbage"]
    receiver.tell(do="totals")
    assert receiver.wait("frames_refused")["frames_refused"] == sent > 20
    check_handoff(receiver, sender, address, "after-garbage")
