"""Life of a worker process, the same for both roles: serve, join, run, leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from stateferry.api.server import RunningServer
from stateferry.core.errors import InvariantViolation
from stateferry.core.worker import WorkerDescription, WorkerLoad
from stateferry.worker.host import WorkerHost
from stateferry.worker.join import RouterLink

GRACE_S = 5.0


# Gets the process's addresses by name.
Announce = Callable[[dict[str, str]], None]


async def serve_until_stopped(
    server: RunningServer,
    loop: Coroutine[Any, Any, None],
    host: WorkerHost,
    description: WorkerDescription,
    load: Callable[[], WorkerLoad],
    announce: Announce,
    stop: asyncio.Event,
) -> None:
    """Run the step loop and stay joined to all routers until ``stop`` is set.

    Leaves the routers first, so that nothing new arrives, then lets calls in flight finish. The
    step loop and the links end by a bug only; then the process ends too, with InvariantViolation,
    rather than leave a worker that hangs its callers or that nobody knows of.
    """
    links = [
        asyncio.create_task(RouterLink(address, description, load, host.cluster_key).run())
        for address in host.routers
    ]
    stepping = asyncio.create_task(loop)
    stopping = asyncio.create_task(stop.wait())
    announce(_addresses(description))
    background = (stepping, *links)
    try:
        await asyncio.wait({stopping, *background}, return_when=asyncio.FIRST_COMPLETED)
        broken = next((task for task in background if task.done()), None)
        await _cancel(links)
        await server.stop(GRACE_S if broken is None else 0.0)
    finally:
        await _cancel([*background, stopping])
    if broken is not None:
        cause = None if broken.cancelled() else broken.exception()
        raise InvariantViolation(f"a part of the worker ended by itself: {cause!r}") from cause


def _addresses(worker: WorkerDescription) -> dict[str, str]:
    return {
        "worker_id": worker.key.worker_id,
        "grpc": worker.grpc_address,
        "metrics": worker.metrics_address,
        "transfer": worker.transfer_address or "",
    }


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
