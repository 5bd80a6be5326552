"""The demonstration behind ``make demo``: three prompts through three processes.

The last line is ``RESULT {json}``. ``ttft_s`` (as the client saw it), ``tokens_per_s``,
``handoff_bytes`` and ``handoff_ms`` are medians over the prompts; ``prompts`` counts those that
completed. The exit code is 0 only if all did, and every state crossed UCX.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
from rich.console import Console
from rich.text import Text

from stateferry.client import Client, Completion, Delta, GenerateOptions, describe_error
from stateferry.config import Config
from stateferry.core.errors import ConfigError
from stateferry.local.cluster import LocalCluster
from stateferry.local.tables import address_table, load_table
from stateferry.local.terminal import printable
from stateferry.local.view import ClusterView

PROMPTS = (
    "It was a bright cold morning, and",
    "She had never been so happy",
    "When the server receives a request, it",
)
# Seeded, so that two runs print the same text; a little warmth reads better than greedy.
# At least 16 tokens: a model that ends its text at once would leave nothing to hand off.
OPTIONS = GenerateOptions(
    max_tokens=64, min_tokens=16, temperature=0.6, top_p=0.9, seed=2024, timeout_s=60.0
)
_WANTED_TRANSPORT = "ucx"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One prompt. ``completion`` is None and ``problem`` says why if it failed."""

    ttft_s: float
    completion: Completion | None
    problem: str = ""


def run_demo(config: Config, prompts_file: Path | None) -> int:
    """Run the demonstration; returns the exit code. Raises Unavailable if nothing starts."""
    console = Console()
    prompts = PROMPTS if prompts_file is None else read_prompts(prompts_file)
    outcomes: list[Outcome] = []
    view = ClusterView(console, show_logs=False)
    console.print("Starting a router, a prefill worker and a decode worker ...")
    cluster = LocalCluster(
        config,
        on_line=view.line,
        on_death=view.death,
        on_status=view.status,
    )
    try:
        with cluster:
            view.started()
            outcomes = asyncio.run(_talk(console, cluster, prompts, config))
            console.print(address_table(cluster.addresses, cluster.pids))
    finally:
        view.started()
    problems = [*find_problems(outcomes), *map(str, cluster.deaths)]
    for problem in problems:
        console.print(Text(f"FAILED: {problem}", style="bold red"), soft_wrap=True)
    # Not through the console, which would wrap it.
    print("RESULT", json.dumps(result(outcomes)), flush=True)
    return 1 if problems else 0


def read_prompts(file: Path) -> tuple[str, ...]:
    """The non-empty lines of ``file``. Raises ConfigError when there are none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--prompts-file", f"cannot read {file}: {error}") from error
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise ConfigError("--prompts-file", f"{file} holds no prompt")
    return prompts


def find_problems(outcomes: Sequence[Outcome]) -> list[str]:
    """Why the demonstration does not count, if it does not."""
    problems = [] if outcomes else ["no prompt was sent"]
    for number, outcome in enumerate(outcomes, start=1):
        if outcome.completion is None:
            problems.append(f"prompt {number}: {outcome.problem}")
            continue
        times = outcome.completion.timings
        if times.transport != _WANTED_TRANSPORT:
            problems.append(f"prompt {number}: the state went over {times.transport or 'nothing'}")
        if not times.handoff_bytes:
            problems.append(f"prompt {number}: no bytes were handed off")
    return problems


def result(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """The machine-readable summary."""
    done = [outcome.completion for outcome in outcomes if outcome.completion is not None]

    def median(values: list[float], digits: int) -> float:
        return round(statistics.median(values), digits) if values else 0.0

    return {
        "prompts": len(done),
        "ttft_s": median([o.ttft_s for o in outcomes if o.completion is not None], 4),
        "tokens_per_s": median([c.tokens_per_s for c in done], 1),
        "handoff_bytes": int(median([float(c.timings.handoff_bytes) for c in done], 0)),
        "handoff_ms": median([c.timings.handoff_s * 1e3 for c in done], 2),
        "transport": ",".join(sorted({c.timings.transport for c in done})),
    }


async def _talk(
    console: Console, cluster: LocalCluster, prompts: Sequence[str], config: Config
) -> list[Outcome]:
    outcomes = []
    async with Client(cluster.router_address) as client:
        for number, prompt in enumerate(prompts, start=1):
            console.rule(f"prompt {number} of {len(prompts)}", align="left")
            # Prompts that begin alike share nothing here: each is to be handed off.
            options = replace(OPTIONS, cache_salt=str(number))
            address = cluster.router_address
            outcomes.append(await _one_prompt(console, client, address, prompt, options))
        console.rule("processes", align="left")
        # One more heartbeat of each, or they would still report the last request.
        await asyncio.sleep(1.5 * config.router.heartbeat_interval_s)
        console.print(load_table(await client.list_workers()))
    return outcomes


async def _one_prompt(
    console: Console, client: Client, address: str, prompt: str, options: GenerateOptions
) -> Outcome:
    console.print(Text(prompt, style="bold"), end="")
    began_s = time.monotonic()
    ttft_s = 0.0
    completion = None
    try:
        async with contextlib.aclosing(client.generate(prompt, options)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    ttft_s = ttft_s or time.monotonic() - began_s
                    # Not console.print, which would start a new paragraph for each wrapped piece.
                    print(printable(event.text), end="", flush=True)
                elif isinstance(event, Completion):
                    completion = event
    except grpc.aio.AioRpcError as error:
        print()
        return Outcome(ttft_s, None, describe_error(error, address))
    print()
    if completion is None:
        return Outcome(ttft_s, None, "the stream ended without a completion")
    times = completion.timings
    console.print(
        f"TTFT {ttft_s * 1e3:.1f} ms | hand-off {times.handoff_bytes:,} bytes in "
        f"{times.handoff_s * 1e3:.2f} ms over {times.transport} | "
        f"{completion.tokens_per_s:.1f} tokens/s | {completion.prompt_tokens} prompt + "
        f"{completion.completion_tokens} generated tokens",
        highlight=False,
        soft_wrap=True,
    )
    return Outcome(ttft_s, completion)
