"""What a person sees while a cluster starts: one live line on a terminal, else plain lines."""

from __future__ import annotations

import re
import threading

from rich.console import Console
from rich.status import Status
from rich.text import Text

from stateferry.local.child import Death
from stateferry.local.terminal import printable

_COLOURS = ("cyan", "green", "magenta", "yellow", "blue")
# "time level who source: message", as telemetry/logs.py writes it.
_LOG_LINE = re.compile(r"\S+Z \w+ +\S+ \S+: (.*)")
_STATUS_MAX_CHARS = 48


class ClusterView:
    """Prints to ``console``. Thread safe; its methods are LocalCluster's callbacks."""

    def __init__(self, console: Console, *, show_logs: bool) -> None:
        self._console = console
        self._show_logs = show_logs
        self._lock = threading.Lock()
        self._texts: dict[str, str] = {}
        self._spinner: Status | None = None
        if console.is_terminal:
            self._spinner = console.status("starting")
            self._spinner.start()

    def status(self, name: str, text: str) -> None:
        """A child got further."""
        with self._lock:
            if self._texts.get(name) == text:
                return
            self._texts[name] = text
            if self._spinner is not None:
                self._spinner.update("   ".join(f"{n}: {t}" for n, t in self._texts.items()))
            else:
                self._print(name, text)

    def line(self, name: str, line: str) -> None:
        """A child wrote a line. While it starts, its log tells what it is busy with."""
        if self._show_logs:
            self._print(name, line)
        if self._spinner is not None and (match := _LOG_LINE.match(line)):
            self.status(name, match.group(1)[:_STATUS_MAX_CHARS])

    def death(self, death: Death) -> None:
        """A child died; its last lines say why, unless they were shown already."""
        self._console.print(Text(str(death), style="bold red"), soft_wrap=True)
        if not self._show_logs:
            for line in death.last_lines:
                self._print(death.name, line)

    def started(self) -> None:
        """Ends the display of progress."""
        with self._lock:
            if self._spinner is not None:
                self._spinner.stop()
                self._spinner = None

    def _print(self, name: str, text: str) -> None:
        # Stable over runs, unlike hash().
        colour = _COLOURS[sum(name.encode()) % len(_COLOURS)]
        self._console.print(
            Text.assemble((f"{name:<10}", colour), " | ", printable(text)),
            soft_wrap=True,
            highlight=False,
        )
