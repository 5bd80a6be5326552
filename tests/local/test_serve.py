"""The commands against real processes: serve, generate, status, models, a death, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.tiny_model import write_tiny_model

STATEFERRY = [sys.executable, "-P", "-m", "stateferry"]


class Serve:
    """A running `stateferry serve`; ``lines`` grows while it writes."""

    def __init__(self, model: Path) -> None:
        command = [*STATEFERRY, "serve", "--model", str(model), "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append(line.rstrip())

    def find(self, pattern: str, timeout_s: float = 60.0) -> re.Match[str]:
        """The first match in a line written so far or soon."""
        deadline_s = time.monotonic() + timeout_s
        ended = False
        while not ended and time.monotonic() < deadline_s:
            ended = self.process.poll() is not None
            if ended:
                self._reader.join()
            for line in list(self.lines):
                if match := re.search(pattern, line):
                    return match
            time.sleep(0.05)
        raise AssertionError("\n".join([f"no line has {pattern!r}:", *self.lines]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    running = Serve(write_tiny_model(tmp_path / "tiny"))
    yield running
    running.close()


def stateferry(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*STATEFERRY, *arguments], capture_output=True, text=True, timeout=60)


def test_serve_talk_die_and_stop(serve: Serve) -> None:
    router = ["--router", serve.find(r"--router (\S+)").group(1)]

    done = stateferry("generate", "hello", *router, "--max-tokens", "6", "--temperature", "0")
    assert done.returncode == 0 and done.stdout.endswith("\n")
    assert re.search(r"5 \+ 6 tokens, first token \d+ ms, .* over ucx; length", done.stderr)

    again = stateferry("generate", "hello", *router, "--max-tokens=6", "--temperature=0", "--json")
    answer = json.loads(again.stdout)
    assert answer["text"] + "\n" == done.stdout
    # What it has, decode computes no more; nothing has to cross again.
    assert answer["prefix_tokens"] == 4 and answer["timings"]["handoff_bytes"] == 0
    apart = ["--cache-salt", "apart", "--json", "--temperature=0", "--max-tokens=6"]
    answer = json.loads(stateferry("generate", "hello", *router, *apart).stdout)
    assert answer["prefix_tokens"] == 0 and answer["timings"]["handoff_bytes"] > 0
    assert answer["text"] + "\n" == done.stdout

    refused = stateferry("generate", "hello", *router, "--top-p", "7")
    assert refused.returncode == 1
    assert refused.stderr.startswith("stateferry: INVALID_ARGUMENT: sampling.top_p")

    workers = json.loads(stateferry("status", *router, "--json").stdout)
    assert [w["description"]["worker_id"] for w in workers] == ["prefill-0", "decode-0"]
    assert "tiny" in stateferry("models", *router).stdout

    pid = int(serve.find(r"^ *decode-0 +(\d+) ").group(1))
    os.kill(pid, signal.SIGKILL)
    serve.find(rf"decode-0 \(pid {pid}\) died: killed by SIGKILL", timeout_s=2.0)

    serve.process.send_signal(signal.SIGINT)
    assert serve.process.wait(15.0) == 1
    assert not Path(f"/proc/{pid}").exists()


def test_it_stops_while_it_starts(serve: Serve) -> None:
    serve.find("prefill-0 .* starting")
    serve.process.send_signal(signal.SIGTERM)
    assert serve.process.wait(15.0) == 0
    serve.find("stopped while starting", timeout_s=1.0)
