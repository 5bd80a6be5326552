"""What this machine can give at most: bytes read per second, and multiply-adds per second."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bench.peers.cases import Case

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_BUFFER_BYTES = 256 << 20
_MATMUL_SIZES = (1024, 2048)
_REPEATS = 5
_SLOW_FLOPS = 20e9


@dataclass(frozen=True)
class Machine:
    """The best of a few repeats, with all threads."""

    read_bytes_per_s: float
    matmul_flops: dict[str, float]


@dataclass(frozen=True)
class Weights:
    """Elements of a model's matrices that a pass multiplies with, and the bytes that the widest of
    them has in its file: nobody needs more to hold it."""

    body: int
    head: int
    itemsize: int


def measure_machine(threads: int) -> Machine:
    torch.set_num_threads(threads)
    return Machine(_read_rate(), {name: _matmul_rate(dtype) for name, dtype in _DTYPES.items()})


def read_weights(checkpoint: Path) -> Weights:
    """From the shapes in the files. An embedding is looked up, not multiplied with, unless it is
    the head as well."""
    tied = json.loads((checkpoint / "config.json").read_text()).get("tie_word_embeddings", False)
    body = head = itemsize = 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                stored = tensors.get_slice(name)
                shape = stored.get_shape()
                if len(shape) != 2:
                    continue
                itemsize = max(itemsize, _STORED_BYTES[stored.get_dtype()])
                if "lm_head" in name or ("embed" in name and tied):
                    head = math.prod(shape)
                elif "embed" not in name:
                    body += math.prod(shape)
    return Weights(body, head, itemsize)


def ceiling(case: Case, weights: Weights, dtype: str, machine: Machine) -> float:
    """Tokens/s, if nothing took time but this: in decode, reading each weight once a step; in
    prefill, multiplying with them, the head only for the last token."""
    if case.kind == "decode":
        itemsize = min(weights.itemsize, _DTYPES[dtype].itemsize)
        size = (weights.body + weights.head) * itemsize
        return case.batch * machine.read_bytes_per_s / size
    flops = 2.0 * (weights.body + weights.head / case.prompt_tokens)
    # Weights in bf16 may be multiplied as fp32, where that is faster.
    narrow = {"bfloat16": ("bfloat16", "float32"), "float32": ("float32",)}[dtype]
    return max(machine.matmul_flops[name] for name in narrow) / flops


def _read_rate() -> float:
    # A matrix-vector product and a sum: whichever this build of torch reads faster with.
    matrix = torch.ones(_BUFFER_BYTES // 4 // 4096, 4096)
    vector = torch.ones(4096)
    ways: list[Callable[[], Any]] = [matrix.sum, lambda: torch.mv(matrix, vector)]
    return _BUFFER_BYTES / min(_best_s(way) for way in ways)


def _matmul_rate(dtype: torch.dtype) -> float:
    rates = []
    for size in _MATMUL_SIZES:
        a, b, out = (torch.ones(size, size, dtype=dtype) for _ in range(3))
        rates.append(2.0 * size**3 / _best_s(_product(a, b, out)))
        if rates[-1] < _SLOW_FLOPS:
            # Some builds of torch have no bf16 product to speak of on some processors.
            break
    return max(rates)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
    return lambda: torch.mm(a, b, out=out)


def _best_s(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if times[-1] > 1.0:
            break
    return min(times)
