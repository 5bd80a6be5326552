"""Commands that talk to a router: generate, status, models."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
from collections.abc import Coroutine
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console
from rich.table import Table

from stateferry.cli.options import ConfigFile, RouterAddress, Settings, router_address
from stateferry.client import Client, Completion, Delta, GenerateOptions, describe_error
from stateferry.core.errors import InvalidRequest, StateferryError, Unavailable
from stateferry.local.tables import load_table, worker_address_table
from stateferry.local.terminal import printable

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
_PLAIN_TIMEOUT_S = 10.0


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (generate, status, models):
        app.command()(command)


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    router: RouterAddress = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus, in (0, 1].")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends it; repeatable.")] = None,
    as_json: AsJson = False,
    file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Continue a prompt, printing the text as it arrives."""
    address = router_address(router, file, settings)
    options = GenerateOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    _run(_generate(address, text, options, as_json), address)


def status(
    router: RouterAddress = None,
    as_json: AsJson = False,
    file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Show the workers of a router: load, slots, kernels, addresses."""
    address = router_address(router, file, settings)
    _run(_status(address, as_json), address)


def models(
    router: RouterAddress = None, file: ConfigFile = None, settings: Settings = None
) -> None:
    """List the models that a router serves."""
    address = router_address(router, file, settings)
    _run(_models(address), address)


async def _generate(address: str, prompt: str, options: GenerateOptions, as_json: bool) -> None:
    texts = []
    # A file or a pipe gets the text as it is.
    shown = printable if sys.stdout.isatty() else str
    async with (
        Client(address) as client,
        contextlib.aclosing(client.generate(prompt, options)) as events,
    ):
        async for event in events:
            if isinstance(event, Delta):
                texts.append(event.text)
                if not as_json:
                    print(shown(event.text), end="", flush=True)
            elif as_json:
                print(json.dumps({"text": "".join(texts), **dataclasses.asdict(event)}))
            else:
                print(flush=True)
                print(summary(event), file=sys.stderr)


def summary(completion: Completion) -> str:
    """How a request went, in one line."""
    times = completion.timings
    parts = [
        f"{completion.prompt_tokens} + {completion.completion_tokens} tokens",
        f"first token {times.ttft_s * 1e3:.0f} ms",
        f"{completion.tokens_per_s:.1f} tokens/s",
    ]
    if times.transport:
        parts.append(
            f"hand-off {times.handoff_bytes / 1e6:.2f} MB in {times.handoff_s * 1e3:.1f} ms "
            f"over {times.transport}"
        )
    return f"[{', '.join(parts)}; {completion.finish_reason}]"


async def _status(address: str, as_json: bool) -> None:
    async with Client(address) as client:
        workers = await asyncio.wait_for(client.list_workers(), _PLAIN_TIMEOUT_S)
    if as_json:
        from google.protobuf.json_format import MessageToDict

        rows = [MessageToDict(worker, preserving_proto_field_name=True) for worker in workers]
        print(json.dumps(rows))
    else:
        Console().print(load_table(workers), worker_address_table(workers))


async def _models(address: str) -> None:
    async with Client(address) as client:
        models = await asyncio.wait_for(client.list_models(), _PLAIN_TIMEOUT_S)
    table = Table("model", "context", "vocabulary", "grid", "prefill workers", "decode workers")
    for model in models:
        numbers = (
            model.max_context_tokens,
            model.vocab_size,
            model.grid_tokens,
            model.prefill_workers,
            model.decode_workers,
        )
        table.add_row(model.name, *map(str, numbers))
    Console().print(table)


def _run(work: Coroutine[Any, Any, None], address: str) -> None:
    """Run ``work``; failures become errors of ours that name ``address``."""
    try:
        asyncio.run(work)
    except grpc.aio.AioRpcError as error:
        raise StateferryError(describe_error(error, address)) from error
    except TimeoutError as error:
        raise Unavailable(f"no answer from {address} in {_PLAIN_TIMEOUT_S:.0f} s") from error
    except ValueError as error:
        # protobuf refuses values that do not fit a field before anything is sent.
        raise InvalidRequest("request", str(error)) from error
