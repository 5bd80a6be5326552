"""Keeps what requests know of their workers true: channels, losses and counts follow membership."""

from __future__ import annotations

import asyncio
import logging

from stateferry.core.ids import Role
from stateferry.core.worker import WorkerDescription
from stateferry.router.admission import Admission
from stateferry.router.channels import WorkerChannels, answers
from stateferry.router.loss import LossBoard
from stateferry.router.membership import Change, ChangeKind, WorkerRegistry
from stateferry.router.observer import RouterObserver

log = logging.getLogger(__name__)

# A worker that leaves may be draining or dead; one that answers a health check in time is draining.
PROBE_TIMEOUT_S = 1.0
SWEEP_INTERVAL_S = 0.2


class WorkerWatch:
    """Subscribes to the registry; ``run`` keeps its timers going."""

    def __init__(
        self,
        registry: WorkerRegistry,
        channels: WorkerChannels,
        losses: LossBoard,
        observer: RouterObserver,
    ) -> None:
        self._registry = registry
        self._channels = channels
        self._losses = losses
        self._observer = observer
        self._probes: set[asyncio.Task[None]] = set()
        registry.subscribe(self._on_change)

    async def run(self, admission: Admission) -> None:
        """Sweep silent workers and hopeless waits; end it by cancelling."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                due_s = loop.time() + SWEEP_INTERVAL_S
                await asyncio.sleep(SWEEP_INTERVAL_S)
                late_s = loop.time() - due_s
                if late_s > SWEEP_INTERVAL_S:
                    # Heartbeats that came in the meantime are still unread.
                    self._registry.forgive(late_s)
                self._registry.sweep()
                admission.tick()
        finally:
            for probe in self._probes:
                probe.cancel()

    def _on_change(self, change: Change) -> None:
        key = change.worker.key
        match change.kind:
            case ChangeKind.JOINED:
                self._channels.restore(key)
                self._losses.restore(key)
            case ChangeKind.LEFT if self._losses.is_watched(key):
                self._start_probe(change.worker)
            case ChangeKind.LEFT:
                self._channels.retire(key)
            case ChangeKind.LOST:
                self._losses.announce(key, change.reason)
                self._channels.retire(key)
            case _:
                return
        log.info("worker %s: %s", key, change.reason)
        for role in Role:
            self._observer.workers(role.value, len(self._registry.views(role)))

    def _start_probe(self, worker: WorkerDescription) -> None:
        task = asyncio.get_running_loop().create_task(self._probe(worker))
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    async def _probe(self, worker: WorkerDescription) -> None:
        with self._channels.use(worker) as channel:
            is_alive = await answers(channel, PROBE_TIMEOUT_S)
        if self._registry.is_live(worker.key):
            return
        if not is_alive:
            self._losses.announce(worker.key, "it left and does not answer")
        self._channels.retire(worker.key)
