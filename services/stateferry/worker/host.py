"""One worker process around its engine: who it is, what it measures, how it describes itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from stateferry.core.cluster_key import ClusterKey
from stateferry.core.ids import Role, WorkerKey, new_incarnation
from stateferry.core.worker import WorkerDescription, WorkerLoad
from stateferry.telemetry.metrics import WorkerMetrics
from stateferry.worker.meter import WorkerMeter
from stateferry.worker.parts import EngineParts
from stateferry.worker.priority import stand_back


class Queue(Protocol):
    """The part of a scheduler that says how busy it is."""

    @property
    def num_active(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def queued_tokens(self) -> int: ...


class WorkerHost:
    """What both roles have around their engine. Owns the thread that runs forward passes."""

    def __init__(
        self,
        worker_id: str,
        parts: EngineParts,
        metrics: WorkerMetrics,
        metrics_address: str,
        routers: Sequence[str],
        cluster_key: ClusterKey,
        step_nice: int,
    ) -> None:
        self.key = WorkerKey(worker_id, new_incarnation())
        self.parts = parts
        self.routers = routers
        self.cluster_key = cluster_key
        # One thread, so that at most one forward pass is in flight.
        self.executor = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="engine",
            initializer=stand_back,
            initargs=(step_nice,),
        )
        self._metrics = metrics
        self._metrics_address = metrics_address
        metrics.set_pool_sizes(parts.sizes)

    @property
    def meter(self) -> WorkerMeter:
        return self._metrics

    def describe(
        self,
        role: Role,
        grpc_address: str,
        transfer_address: str | None,
        *,
        preempts: bool = False,
    ) -> WorkerDescription:
        """What routers are told when the worker joins."""
        return WorkerDescription(
            key=self.key,
            role=role,
            grpc_address=grpc_address,
            transfer_address=transfer_address,
            metrics_address=self._metrics_address,
            fingerprint=self.parts.fingerprint,
            capacity_requests=self.parts.sizes.sequences,
            max_context_tokens=self.parts.limits.max_context_tokens,
            vocab_size=self.parts.limits.vocab_size,
            kernels=self.parts.kernels,
            pools=self.parts.sizes,
            preempts=preempts,
        )

    def load_reporter(self, queue: Queue) -> Callable[[], WorkerLoad]:
        """A function that gives the worker's load now; it also refreshes the gauges."""
        sequence = itertools.count(1)

        def report() -> WorkerLoad:
            cache = self.parts.cache
            load = WorkerLoad(
                sequence=next(sequence),
                active_requests=queue.num_active,
                queued_requests=queue.num_waiting,
                queued_tokens=queue.queued_tokens,
                state_slots=cache.state_slots,
                tail_pages=cache.tail_pages,
                kv_pages=cache.kv_pages,
            )
            self._metrics.set_load(load)
            if not load.active_requests:
                # Raises: a worker whose books are wrong must not go on.
                cache.check_conserved()
            return load

        return report
