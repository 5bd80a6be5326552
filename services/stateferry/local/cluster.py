"""Router, prefill and decode workers as child processes of this one.

::

    with LocalCluster(load_config(overrides={"router.port": 0}), prefill=1, decode=2) as cluster:
        ...                       # cluster.router_address, cluster.pids, cluster.addresses
        cluster.kill("decode-1")  # cluster.deaths then says so

Also an ``async with``. Start it from a thread that outlives it: children die with that thread.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from stateferry.config import AUTO_NICE, Config
from stateferry.core.errors import InvariantViolation, Unavailable
from stateferry.core.ids import Role
from stateferry.local.child import Child, Death
from stateferry.local.environment import child_environment
from stateferry.local.roster import joined_workers

ROUTER = "router"
START_TIMEOUT_S = 180.0
# Longer than a worker's own grace for calls in flight.
STOP_GRACE_S = 10.0
_POLL_S = 0.05
# Decode stands back for prefill where both share the processors: while prompts are computed it
# gets what their threads leave, and a thirtieth besides. With equal shares it would spend its half
# on small batches, a step of which costs nearly as much as one of a full batch, and all the
# requests would end later.
_DECODE_NICE = 15

OnLine = Callable[[str, str], None]
OnDeath = Callable[[Death], None]
OnStatus = Callable[[str, str], None]
MakeCommand = Callable[[str, Path], list[str]]


def role_command(role: str, ready_file: Path) -> list[str]:
    """How a child is started. ``-P`` keeps the current directory off its import path."""
    arguments = ["--ready-file", str(ready_file), "--supervisor-pid", str(os.getpid())]
    return [sys.executable, "-P", "-m", "stateferry", role, *arguments]


def _ignore_line(name: str, line: str) -> None:
    return None


def _ignore_death(death: Death) -> None:
    return None


class LocalCluster:
    """One router and some workers. Nothing is restarted: a death is reported, the rest goes on.

    ``on_line(name, line)`` gets every line a child writes, ``on_death`` every later end that nobody
    asked for, ``on_status(name, text)`` what each child does while it starts; all three are called
    from other threads. ``command`` and ``roster`` are there for tests.
    """

    def __init__(
        self,
        config: Config,
        *,
        prefill: int = 1,
        decode: int = 1,
        on_line: OnLine = _ignore_line,
        on_death: OnDeath = _ignore_death,
        on_status: OnStatus = _ignore_line,
        command: MakeCommand = role_command,
        roster: Callable[[str], frozenset[str]] = joined_workers,
    ) -> None:
        if not config.cluster.key:
            drawn = replace(config.cluster, key=secrets.token_hex(32))
            config = replace(config, cluster=drawn)
        self._config = config
        self._workers = {f"{Role.PREFILL.value}-{n}": Role.PREFILL.value for n in range(prefill)}
        self._workers |= {f"{Role.DECODE.value}-{n}": Role.DECODE.value for n in range(decode)}
        self._on_line = on_line
        self._on_death = on_death
        self._on_status = on_status
        self._command = command
        self._roster = roster
        self._children: dict[str, Child] = {}
        self._addresses: dict[str, dict[str, str]] = {}
        self._deaths: list[Death] = []
        # Deaths before the last restart.
        self._num_mourned = 0
        self._stopping = threading.Event()
        self._started = threading.Event()
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    @property
    def router_address(self) -> str:
        """host:port that clients talk to."""
        return self._addresses[ROUTER]["grpc"]

    @property
    def addresses(self) -> Mapping[str, Mapping[str, str]]:
        """Per process what it wrote when it was ready: grpc, metrics, transfer, ..."""
        return self._addresses

    @property
    def pids(self) -> Mapping[str, int]:
        return {name: child.pid for name, child in self._children.items()}

    @property
    def deaths(self) -> tuple[Death, ...]:
        """Ends that nobody asked for (``kill`` counts as nobody), oldest first."""
        return tuple(self._deaths)

    @property
    def ready_directory(self) -> Path:
        """Where children write their addresses, while the cluster runs."""
        assert self._directory is not None
        return Path(self._directory.name)

    @property
    def num_running(self) -> int:
        return sum(child.is_running for child in self._children.values())

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start everything; return once the router sees all workers. Stops all on failure.

        Raises Unavailable naming the child that died or is late, with its last lines.
        """
        deadline_s = time.monotonic() + timeout_s
        try:
            self._spawn_router()
            self._wait_ready({ROUTER}, deadline_s)
            self._spawn_workers()
            self._wait_joined(set(self._workers), deadline_s)
        except BaseException:
            self.stop()
            raise

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send one process a signal, for tests of failures."""
        self._children[name].send_signal(number)

    def restart(self, name: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Begin a worker's next life; its last one is over. Returns once the router sees it. Raises
        Unavailable as ``start``."""
        self._spawn_again(name)
        self._wait_joined({name}, time.monotonic() + timeout_s)

    async def restart_beside(self, name: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """The same, while the event loop runs."""
        self._spawn_again(name)
        await asyncio.to_thread(self._wait_joined, {name}, time.monotonic() + timeout_s)

    def wait_dead(self, name: str, timeout_s: float) -> bool:
        """Whether the process has ended, been reaped and been reported within ``timeout_s``."""
        return self._children[name].wait(timeout_s)

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """SIGTERM to all, SIGKILL after ``grace_s`` to those left; returns when all are reaped."""
        self._stopping.set()
        for child in self._children.values():
            child.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + grace_s
        for child in self._children.values():
            if not child.wait(max(0.0, deadline_s - time.monotonic())):
                child.send_signal(signal.SIGKILL)
        for child in self._children.values():
            # A killed process ends; a wait without a bound could still hang on a broken kernel.
            child.wait(STOP_GRACE_S)
        if self._directory is not None:
            self._directory.cleanup()

    def abandon(self) -> None:
        """Make a ``start`` in progress give up. Safe in a signal handler; ``stop`` must follow."""
        self._stopping.set()

    def kill_all(self) -> None:
        """SIGKILL to all, at once; ``stop`` still has to reap them."""
        self._stopping.set()
        for child in self._children.values():
            child.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        """Like ``start``, but the event loop runs while the children load."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        try:
            # Spawned here and not in to_thread: a child dies with the thread that started it.
            self._spawn_router()
            await asyncio.to_thread(self._wait_ready, {ROUTER}, deadline_s)
            self._spawn_workers()
            await asyncio.to_thread(self._wait_joined, set(self._workers), deadline_s)
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.stop)

    def _spawn_router(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="stateferry-")
        self._spawn(ROUTER, ROUTER, self._config)

    def _spawn_again(self, name: str) -> None:
        if self._children[name].is_running:
            raise InvariantViolation(f"{name} is running")
        self._ready_file(name).unlink(missing_ok=True)
        self._num_mourned = len(self._deaths)
        self._spawn_worker(name)

    def _spawn_workers(self) -> None:
        for name in self._workers:
            self._spawn_worker(name)

    def _spawn_worker(self, name: str) -> None:
        role = self._workers[name]
        worker = replace(
            self._config.worker,
            id=name,
            workers_per_machine=max(len(self._workers), self._config.worker.workers_per_machine),
            step_nice=self._step_nice(role),
        )
        routers = replace(self._config.cluster, routers=self.router_address)
        self._spawn(name, role, replace(self._config, cluster=routers, worker=worker))

    def _step_nice(self, role: str) -> int:
        asked = self._config.worker.step_nice
        if asked != AUTO_NICE:
            return asked
        shares = role == Role.DECODE.value and Role.PREFILL.value in self._workers.values()
        return _DECODE_NICE if shares else 0

    def _spawn(self, name: str, role: str, config: Config) -> None:
        self._on_status(name, "starting")
        self._children[name] = Child(
            name,
            self._command(role, self._ready_file(name)),
            child_environment(config),
            self._on_line,
            self._report_death,
        )

    def _wait_joined(self, names: set[str], deadline_s: float) -> None:
        self._wait_ready(names, deadline_s)
        while missing := names - self._roster(self.router_address):
            self._check_alive(missing, deadline_s, "did not join the router")
            time.sleep(_POLL_S)
        self._started.set()
        for name in names:
            self._on_status(name, "joined")

    def _wait_ready(self, names: set[str], deadline_s: float) -> None:
        waiting = set(names)
        while waiting:
            for name in sorted(waiting):
                if self._ready_file(name).exists():
                    content = self._ready_file(name).read_text(encoding="utf-8")
                    self._addresses[name] = json.loads(content)
                    self._on_status(name, "ready")
                    waiting.discard(name)
            if waiting:
                self._check_alive(waiting, deadline_s, "was not ready")
                time.sleep(_POLL_S)

    def _check_alive(self, waiting: set[str], deadline_s: float, problem: str) -> None:
        recent = self._deaths[self._num_mourned :]
        deaths = [d for d in recent if d.name in waiting or not self._started.is_set()]
        if deaths:
            death = deaths[0]
            raise Unavailable("\n".join([f"{death} while starting", *death.last_lines]))
        if self._stopping.is_set():
            raise Unavailable("stopped while starting")
        if time.monotonic() > deadline_s:
            raise Unavailable(f"{', '.join(sorted(waiting))} {problem} in time")

    def _ready_file(self, name: str) -> Path:
        return self.ready_directory / f"{name}.json"

    def _report_death(self, death: Death) -> None:
        if not self._stopping.is_set():
            self._deaths.append(death)
            # One that happens during the start is part of the error that ``start`` raises.
            if self._started.is_set():
                self._on_death(death)
