"""The engine on a GPU, random models of public sizes: prefill, and decode steps with and without
graphs. ``python -m bench.gpu.bench_engine`` prints a table."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.gpu.ceilings import ceilings
from stateferry.config import CacheSection, ModelSection, WorkerSection
from stateferry.core.sampling import SamplingParams
from stateferry.engine.forward_batch import (
    DecodeBatch,
    DecodeInput,
    ExtendBatch,
    ExtendRow,
    PendingToken,
    SampleSpec,
)
from stateferry.engine.launch import Started
from stateferry.worker.parts import EngineParts, build_engine
from support.gpu_models import Sizes, write_random_model

BATCHES = (1, 8, 64)
PROMPT, CONTEXT, GRID = 512, 2048, 64
PREFILLS = (512, 2048)
STEPS = 100

_130M = Sizes(
    hidden=768, vocab=32000, headdim=64, dstate=128, ngroups=1, attention_heads=12, kv_heads=4,
    attention_head_dim=64, intermediate=2304,
)  # fmt: skip
_1_3B = Sizes(
    hidden=2048, vocab=50288, headdim=64, dstate=128, ngroups=1, attention_heads=32, kv_heads=8,
    attention_head_dim=64, intermediate=6144,
)  # fmt: skip
# Name -> layers and sizes; those of NemotronH as `make bench-peers` has them.
MODELS = {
    "mamba2-130m": ("M" * 24, _130M),
    "nemotron_h-130m": ("M-M-*-M-" * 3, _130M),
    "mamba2-1.3b": ("M" * 48, _1_3B),
    "nemotron_h-1.3b": ("M-M-*-M-" * 6, _1_3B),
}


@dataclass(frozen=True, slots=True)
class EngineRow:
    """tokens_per_s of all sequences together. floor (decode): share of the time that reading the
    weights once and each sequence's states takes at the bandwidth of an update in place."""

    model: str
    case: str
    batch: int
    ms: float
    tokens_per_s: float
    floor: float | None = None


def bench_model(name: str, folder: Path, memory_tbs: float) -> list[EngineRow]:
    """All rows of one model; writes it to ``folder`` first."""
    pattern, sizes = MODELS[name]
    model_dir = write_random_model(folder / name, pattern, sizes, torch.bfloat16, device="cuda")
    weight_bytes = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    parts = build_engine(
        model_dir,
        ModelSection(dtype="bfloat16", max_context_tokens=CONTEXT + STEPS, grid_tokens=GRID),
        WorkerSection(device="cuda", max_requests=max(BATCHES), memory_bytes=24 << 30),
        CacheSection(enabled=False),
    )
    # A step reads a row of the embedding for each sequence.
    weight_bytes -= 2 * sizes.vocab * sizes.hidden
    state_bytes = 4 * pattern.count("M") * sizes.nheads * sizes.headdim * sizes.dstate
    rows = []
    for length in PREFILLS:
        ms = statistics.median(_prefill_ms(parts, length) for _ in range(5))
        rows.append(EngineRow(name, f"prefill {length}", 1, ms, length / ms * 1e3))
    graphs = parts.runner.graphs
    for batch in BATCHES:
        floor_ms = (weight_bytes + batch * state_bytes) / memory_tbs / 1e9
        for case, ahead in (("graphs", 1), ("graphs, overlapped", 2), ("eager", 1)):
            parts.runner.graphs = None if case == "eager" else graphs
            ms = _decode_ms(parts, batch, STEPS // 4 if case == "eager" else STEPS, ahead)
            rows.append(EngineRow(name, case, batch, ms, batch / ms * 1e3, floor_ms / ms))
    return rows


def bench(memory_tbs: float, names: Sequence[str] = tuple(MODELS)) -> list[EngineRow]:
    rows: list[EngineRow] = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows += bench_model(name, Path(folder), memory_tbs)
    return rows


def table(rows: Sequence[EngineRow]) -> str:
    lines = ["| model | case | batch | ms | tokens/s | floor |", "| --- " * 6 + "|"]
    for row in rows:
        floor = "" if row.floor is None else f"{row.floor:.0%}"
        lines.append(
            f"| {row.model} | {row.case} | {row.batch} | {row.ms:.3f} "
            f"| {row.tokens_per_s:,.0f} | {floor} |"
        )
    return "\n".join(lines)


def _spec() -> SampleSpec:
    return SampleSpec(SamplingParams(0.0, 0, 1.0, 0, None), 0)


def _prefill_ms(parts: EngineParts, length: int) -> float:
    assert parts.cache.reserve("prefill", length + 1)
    row = ExtendRow(parts.cache.lease("prefill"), (7,) * length, _spec())
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    parts.runner.extend(ExtendBatch((row,)))()
    took_s = time.perf_counter() - began_s
    parts.cache.release("prefill")
    return took_s * 1e3


def _decode_ms(parts: EngineParts, batch: int, steps: int, ahead: int) -> float:
    """Mean time of a step, commits included: prompts end at different places of the grid. So many
    steps are started before the first of them is waited for."""
    names = [str(number) for number in range(batch)]
    tokens: list[int | PendingToken] = [7] * batch
    for number, name in enumerate(names):
        assert parts.cache.reserve(name, PROMPT + batch + steps + 8)
        row = ExtendRow(parts.cache.lease(name), (7,) * (PROMPT + number), _spec())
        parts.runner.extend(ExtendBatch((row,)))()
    started: deque[Started] = deque()
    for step in range(steps + 5):
        if step == 5:
            began_s = time.perf_counter()
        leases = [parts.cache.lease(name) for name in names]
        rows = tuple(
            DecodeInput(lease, token, _spec()) for lease, token in zip(leases, tokens, strict=True)
        )
        started.append(parts.runner.decode(DecodeBatch(rows)).start())
        tokens = [row.sampled for row in rows]
        if len(started) == ahead:
            started.popleft().sampled()
    for last in started:
        last.sampled()
    took_s = time.perf_counter() - began_s
    for name in names:
        parts.cache.release(name)
    return took_s * 1e3 / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--out", type=Path, help="file for the rows, as JSON")
    options = parser.parse_args()
    rows = bench(ceilings()["update_tbs"], options.models)
    print(table(rows))
    if options.out is not None:
        options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
