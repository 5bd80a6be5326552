"""The composition root: turns a configuration into one running process.

Nothing here decides anything; every object gets its collaborators by constructor.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import uvloop

import stateferry
from stateferry.bundled import bundled_model_dir
from stateferry.config import NO_SPECULATION, Config, ModelSection
from stateferry.core.cluster_key import ClusterKey
from stateferry.core.errors import ConfigError, ModelError
from stateferry.core.ids import Role
from stateferry.drafting.speculator import Speculator
from stateferry.models.hub import hub_directory, is_hub_id
from stateferry.telemetry.cache_metrics import CacheCollector
from stateferry.telemetry.draft_metrics import DraftCollector, DraftTotals
from stateferry.telemetry.exporter import start_exporter
from stateferry.telemetry.logs import configure_logging
from stateferry.telemetry.metrics import WorkerMetrics, new_registry, set_build_info

log = logging.getLogger(__name__)

ROLES = ("router", *(role.value for role in Role))

Announce = Callable[[dict[str, str]], None]
ProcessMain = Callable[[Announce, asyncio.Event], Awaitable[None]]


def run_process(role: str, config: Config, ready_file: Path | None) -> None:
    """Run one router or worker until SIGINT or SIGTERM.

    ``ready_file`` gets a JSON object of addresses once the process serves. Raises ConfigError,
    ModelError.
    """
    configure_logging(config.log.level, config.worker.id or role)
    if role not in ROLES:
        raise ConfigError("role", f"{role!r} is none of {', '.join(ROLES)}")
    main = _router(config) if role == "router" else _worker(Role(role), config)

    def announce(addresses: dict[str, str]) -> None:
        log.info("ready: %s", " ".join(f"{k}={v}" for k, v in addresses.items() if v))
        if ready_file is not None:
            _write_atomically(ready_file, {"pid": str(os.getpid()), "role": role, **addresses})

    uvloop.run(_until_signalled(main, announce))


def model_directory(section: ModelSection) -> Path:
    """The directory to serve, fetched from the hub if it is named by a hub id. Raises ConfigError
    when it does not hold a model."""
    try:
        if is_hub_id(section.dir):
            path = hub_directory(section.dir)
        else:
            path = Path(section.dir).expanduser() if section.dir else bundled_model_dir()
    except (ModelError, ValueError) as error:
        raise ConfigError("model.dir", str(error)) from error
    if not (path / "config.json").is_file():
        raise ConfigError("model.dir", f"{path} holds no config.json")
    return path.resolve()


def router_addresses(config: Config) -> Sequence[str]:
    """The routers that a worker joins. Raises ConfigError when there are none."""
    addresses = [a.strip() for a in config.cluster.routers.split(",") if a.strip()]
    if not addresses:
        raise ConfigError("cluster.routers", "a worker needs at least one router to join")
    return addresses


def _router(config: Config) -> ProcessMain:
    # Imported late, like the worker's parts below: a router process never loads torch.
    from stateferry.http_front.server import open_http_door
    from stateferry.router.main import run_router

    model_dir = model_directory(config.model)

    async def main(announce: Announce, stop: asyncio.Event) -> None:
        await run_router(config, model_dir, announce, stop, open_http_door)

    return main


def _worker(role: Role, config: Config) -> ProcessMain:
    from stateferry.worker.host import WorkerHost
    from stateferry.worker.links import check_handoff_fits
    from stateferry.worker.parts import build_engine

    routers = router_addresses(config)
    cluster_key = ClusterKey(config.cluster.key.encode())
    model_dir = model_directory(config.model)

    # A prefill worker takes no decode step that a graph or a draft could be for.
    decodes = role is Role.DECODE
    graphs = config.worker.decode_graphs if decodes else "off"
    speculation = config.speculation if decodes else NO_SPECULATION

    async def main(announce: Announce, stop: asyncio.Event) -> None:
        parts = await asyncio.to_thread(
            build_engine,
            model_dir,
            config.model,
            replace(config.worker, decode_graphs=graphs),
            config.cache,
            _log_progress(model_dir),
            speculation,
        )
        check_handoff_fits(parts.cache.pools, parts.limits, config.transfer)
        registry = new_registry()
        set_build_info(
            registry,
            role=role.value,
            version=stateferry.__version__,
            kernels=parts.kernels,
            transport="ucx",
        )
        prefixes = parts.cache.prefixes
        registry.register(
            CacheCollector(
                counters=lambda: asdict(prefixes.counters),
                occupancy=lambda: {
                    pool: asdict(owners) for pool, owners in prefixes.occupancy().items()
                },
            )
        )
        if parts.speculator is not None:
            registry.register(DraftCollector(partial(_draft_totals, parts.speculator)))
        exporter = start_exporter(registry, config.worker.host, config.worker.metrics_port)
        host = WorkerHost(
            worker_id=config.worker.id or f"{role.value}-{socket.gethostname()}-{os.getpid()}",
            parts=parts,
            metrics=WorkerMetrics(registry),
            metrics_address=exporter.address,
            routers=routers,
            cluster_key=cluster_key,
            step_nice=max(0, config.worker.step_nice),
        )
        try:
            if role is Role.PREFILL:
                from stateferry.prefill.main import run_prefill

                await run_prefill(config, host, announce, stop)
            else:
                from stateferry.decode.main import run_decode

                await run_decode(config, host, announce, stop)
        finally:
            host.executor.shutdown()
            exporter.close()

    return main


def _draft_totals(speculator: Speculator) -> DraftTotals:
    return DraftTotals(**asdict(speculator.counts), most_guesses=speculator.most_guesses)


def _log_progress(model_dir: Path) -> Callable[[int, int], None]:
    """Logs the share of weights loaded, every tenth."""
    reported = -1

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal reported
        tenth = done_bytes * 10 // max(1, total_bytes)
        if tenth > reported:
            reported = tenth
            size = total_bytes / 1e6
            log.info("loading %s: %d %% of %.1f MB", model_dir.name, tenth * 10, size)

    return progress


async def _until_signalled(main: ProcessMain, announce: Announce) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await main(announce, stop)


def _write_atomically(file: Path, content: dict[str, str]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(file)
