"""A whole cluster on this machine against the one-process engine: the same requests at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path

from bench.kernels.measure import Times
from bench.peers.cases import Case
from bench.peers.child_loop import draw_prompts
from bench.peers.contenders import OURS, ChildContender, Sample, Setting
from stateferry.client import Client, Completion, GenerateOptions
from stateferry.config import load_config
from stateferry.local.cluster import LocalCluster

CLUSTER = "cluster"


class ClusterContender:
    """Router, prefill and decode worker; ``version`` says with how many threads each."""

    def __init__(self, setting: Setting, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._cluster = LocalCluster(
            load_config(
                overrides={
                    "model.dir": str(setting.checkpoint),
                    "model.dtype": setting.dtype,
                    "model.max_context_tokens": setting.max_context,
                    "worker.threads": setting.threads,
                    "worker.max_requests": setting.max_batch,
                    "router.port": 0,
                    "log.level": "warning",
                }
            )
        )
        self._cluster.start()
        self.version = f"{setting.threads} threads per worker"

    def sample(self, case: Case, seed: int) -> Sample:
        """All of the time in ``first_s``: requests of a cluster overlap."""
        prompts = draw_prompts(case.batch, case.prompt_tokens, self._vocab_size, seed)
        return Sample(asyncio.run(self._all(prompts, case.new_tokens)), 0.0, 0)

    def close(self) -> None:
        self._cluster.stop()

    async def _all(self, prompts: list[list[int]], new_tokens: int) -> float:
        options = GenerateOptions(
            max_tokens=new_tokens, temperature=0.0, ignore_eos=True, timeout_s=300.0
        )
        async with Client(self._cluster.router_address) as client:
            await client.list_models()
            start = time.perf_counter()
            counts = await asyncio.gather(*(_one(client, ids, options) for ids in prompts))
            seconds = time.perf_counter() - start
        if set(counts) != {new_tokens}:
            raise RuntimeError(f"a request of {new_tokens} tokens got {counts}")
        return seconds


async def _one(client: Client, prompt: list[int], options: GenerateOptions) -> int:
    completed = 0
    async with contextlib.aclosing(client.generate(prompt, options)) as events:
        async for event in events:
            if isinstance(event, Completion):
                completed = event.completion_tokens
    return completed


def compare_serving(
    engine: ChildContender, cluster: ClusterContender, case: Case, rounds: int
) -> Times:
    """In turns, after one that does not count; one idles, asleep, while the other works."""
    contenders = {OURS: engine, CLUSTER: cluster}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-1, rounds):
        for name, contender in contenders.items():
            sampled = contender.sample(case, seed=100 + number)
            if number >= 0:
                seconds[name].append(sampled.seconds_per_token(case))
    return Times(seconds)


def vocabulary(checkpoint: Path) -> int:
    size: int = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    return size
