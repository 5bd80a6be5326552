"""The composition root: turns a configuration into one running process.

Nothing here decides anything; every object gets its collaborators by constructor.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import uvloop

from stateferry.bundled import bundled_model_dir
from stateferry.config import Config, ModelSection
from stateferry.core.errors import ConfigError
from stateferry.core.ids import Role

log = logging.getLogger(__name__)

Ready = Callable[[dict[str, str]], None]
ProcessMain = Callable[[Config, Path, Ready, asyncio.Event], Awaitable[None]]


def run_process(role: str, config: Config, ready_file: Path | None) -> None:
    """Run one router or worker until SIGINT or SIGTERM.

    ``ready_file`` gets a JSON object of addresses once the process serves. Raises ConfigError.
    """
    main = _main_of(role)
    model_dir = model_directory(config.model)

    def ready(addresses: dict[str, str]) -> None:
        log.info("ready: %s", " ".join(f"{k}={v}" for k, v in addresses.items()))
        if ready_file is not None:
            _write_atomically(ready_file, {"pid": str(os.getpid()), "role": role, **addresses})

    uvloop.run(_until_signalled(main, config, model_dir, ready))


def model_directory(section: ModelSection) -> Path:
    """The directory to serve. Raises ConfigError when it does not hold a model."""
    path = Path(section.dir).expanduser() if section.dir else bundled_model_dir()
    if not (path / "config.json").is_file():
        raise ConfigError("model.dir", f"{path} holds no config.json")
    return path.resolve()


def router_addresses(config: Config) -> Sequence[str]:
    """The routers that a worker joins. Raises ConfigError when there are none."""
    addresses = [a.strip() for a in config.cluster.routers.split(",") if a.strip()]
    if not addresses:
        raise ConfigError("cluster.routers", "a worker needs at least one router to join")
    return addresses


def _main_of(role: str) -> ProcessMain:
    # Imported late: a router process must never load torch.
    if role == "router":
        from stateferry.router.main import run_router

        async def router_main(
            config: Config, model_dir: Path, ready: Ready, stop: asyncio.Event
        ) -> None:
            await run_router(config, model_dir, ready, stop)

        return router_main
    if role == Role.PREFILL.value:
        from stateferry.prefill.main import run_prefill

        return run_prefill
    if role == Role.DECODE.value:
        from stateferry.decode.main import run_decode

        return run_decode
    raise ConfigError("role", f"{role!r} is not router, prefill or decode")


async def _until_signalled(
    main: ProcessMain, config: Config, model_dir: Path, ready: Ready
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    await main(config, model_dir, ready, stop)


def _write_atomically(file: Path, content: dict[str, str]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(file)
