"""One supervised process: its log lines, its end, and the way to stop it."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_LINE_MAX_BYTES = 64 << 10
_TAIL_LINES = 20
# A dead child's pipe is at its end, unless a grandchild holds it open.
_DRAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Death:
    """A child's end. ``returncode`` is as in subprocess: minus the signal's number if killed."""

    name: str
    pid: int
    returncode: int
    last_lines: tuple[str, ...]

    @property
    def cause(self) -> str:
        """For people, for example ``killed by SIGKILL`` or ``exit code 1``."""
        if self.returncode >= 0:
            return f"exit code {self.returncode}"
        try:
            return f"killed by {signal.Signals(-self.returncode).name}"
        except ValueError:
            return f"killed by signal {-self.returncode}"

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}) died: {self.cause}"


class Child:
    """A started process. ``on_line`` and ``on_death`` are called from this object's threads."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        on_line: Callable[[str, str], None],
        on_death: Callable[[Death], None],
    ) -> None:
        self.name = name
        self._on_line = on_line
        self._on_death = on_death
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        # Its own process group: Ctrl-C must reach the supervisor alone, which then stops all.
        self._process = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        self._reader = threading.Thread(target=self._read, name=f"log-{name}", daemon=True)
        self._waiter = threading.Thread(target=self._wait, name=f"wait-{name}", daemon=True)
        self._reader.start()
        self._waiter.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def send_signal(self, number: signal.Signals) -> None:
        """Does nothing when the process has ended; never hits a recycled pid."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """Whether the process ended, and was reaped and reported, within ``timeout_s``."""
        self._waiter.join(timeout_s)
        return not self._waiter.is_alive()

    def _read(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        with pipe:
            while raw := pipe.readline(_LINE_MAX_BYTES):
                line = raw.decode("utf-8", errors="replace").rstrip("\r\n")
                self._tail.append(line)
                self._on_line(self.name, line)

    def _wait(self) -> None:
        returncode = self._process.wait()
        self._reader.join(_DRAIN_S)
        self._on_death(Death(self.name, self.pid, returncode, tuple(self._tail)))
