"""vLLM's CPU build as a contender, in the Python that it is installed in. Started by contenders.py,
not by hand."""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from child_loop import Sample, serve

_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # The engine in this process: two cores have no room for one more.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def preload_openmp() -> None:
    """Start again with torch's own OpenMP preloaded, or vLLM pins the threads of another one."""
    if "libgomp" in os.environ.get("LD_PRELOAD", ""):
        return
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed in this Python")
    site = Path(spec.origin).parent
    found = glob.glob(f"{site}/lib/libgomp*") + glob.glob(f"{site.parent}/torch.libs/libgomp*")
    if found:
        os.environ["LD_PRELOAD"] = found[0]
        os.execv(sys.executable, [sys.executable, *sys.argv])


def load(request: dict[str, Any]) -> tuple[str, int, Sample]:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{request['threads'] - 1}")
    import vllm

    llm = vllm.LLM(
        request["checkpoint"],
        dtype=request["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=not request["compile"],
        # On the CPU it crashes with Mamba-2 layers.
        enable_prefix_caching=False,
        max_model_len=request["max_context"],
        max_num_seqs=request["max_batch"],
        max_num_batched_tokens=4096,
        seed=0,
    )
    count = 0

    def sample(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        nonlocal count
        count += 1
        return _sample(llm.llm_engine, vllm.SamplingParams, prompts, new_tokens, count)

    config = json.loads((Path(request["checkpoint"]) / "config.json").read_text())
    mode = "compiled" if request["compile"] else "eager"
    return f"{vllm.__version__} ({mode})", config["vocab_size"], sample


def _sample(
    engine: Any, params: Any, prompts: list[list[int]], new_tokens: int, count: int
) -> dict[str, Any]:
    greedy = params(
        temperature=0,
        max_tokens=new_tokens,
        min_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
    )
    tokens: dict[str, list[int]] = {f"{count}-{number}": [] for number in range(len(prompts))}
    start = time.perf_counter()
    for name, ids in zip(tokens, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": ids}, greedy)
    first, before = 0.0, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        if not first and all(tokens.values()):
            first = time.perf_counter()
            before = sum(map(len, tokens.values()))
    end = time.perf_counter()
    if any(len(ids) != new_tokens for ids in tokens.values()):
        raise RuntimeError("vLLM returned another number of tokens than it was asked for")
    return {
        "first_s": first - start,
        "rest_s": end - first,
        "rest_tokens": sum(map(len, tokens.values())) - before,
        "tokens": [ids[:8] for ids in tokens.values()],
    }


if __name__ == "__main__":
    preload_openmp()
    serve(load)
