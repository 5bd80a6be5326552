"""Commands that look at a router: status, models."""

from __future__ import annotations

import asyncio
import json

import typer
from rich.console import Console
from rich.table import Table

from stateferry.cli.calls import PLAIN_TIMEOUT_S, run_call
from stateferry.cli.options import AsJson, ConfigFile, RouterAddress, Settings, router_address
from stateferry.client import Client
from stateferry.local.tables import load_table, memory_table, worker_address_table


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (status, models):
        app.command()(command)


def status(
    router: RouterAddress = None,
    as_json: AsJson = False,
    file: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Show the workers of a router: load, slots, kernels, addresses."""
    address = router_address(router, file, settings)
    run_call(_status(address, as_json), address)


def models(
    router: RouterAddress = None, file: ConfigFile = None, settings: Settings = None
) -> None:
    """List the models that a router serves."""
    address = router_address(router, file, settings)
    run_call(_models(address), address)


async def _status(address: str, as_json: bool) -> None:
    async with Client(address) as client:
        workers = await asyncio.wait_for(client.list_workers(), PLAIN_TIMEOUT_S)
    if as_json:
        from google.protobuf.json_format import MessageToDict

        rows = [MessageToDict(worker, preserving_proto_field_name=True) for worker in workers]
        print(json.dumps(rows))
    else:
        Console().print(load_table(workers), memory_table(workers), worker_address_table(workers))


async def _models(address: str) -> None:
    async with Client(address) as client:
        models = await asyncio.wait_for(client.list_models(), PLAIN_TIMEOUT_S)
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
