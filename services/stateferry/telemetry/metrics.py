"""Every metric, by owner. A process makes one registry, and one object for those who measure.

Names are ``stateferry_<component>_<thing>_<unit>`` in base units (seconds, bytes). Labels take few
values: roles, gRPC codes, results, pools; never request ids, prompts or addresses. There are no
module-level metrics, so that two processes' worth of them can live in one test.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from stateferry.core.ids import Role
from stateferry.core.worker import PoolCount, PoolSizes, WorkerLoad
from stateferry.telemetry import buckets


def new_registry() -> CollectorRegistry:
    """A registry that also reports this process's memory, CPU time and open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def set_build_info(
    registry: CollectorRegistry, *, role: str, version: str, kernels: str, transport: str
) -> None:
    """``stateferry_process_info``: always 1, for joining on its labels.

    ``kernels`` and ``transport`` are empty on a router.
    """
    Gauge(
        "stateferry_process_info",
        "What this process is. Always 1.",
        ("role", "version", "kernels", "transport"),
        registry=registry,
    ).labels(role, version, kernels, transport).set(1)


class RouterMetrics:
    """Implements ``router/observer.py: RouterObserver``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, help: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"stateferry_router_{name}", help, labels, registry=registry)

        def gauge(name: str, help: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"stateferry_router_{name}", help, labels, registry=registry)

        def seconds(name: str, help: str, bounds: tuple[float, ...]) -> Histogram:
            full = f"stateferry_router_{name}_seconds"
            return Histogram(full, help, buckets=bounds, registry=registry)

        self._received = counter("requests_received_total", "Calls that arrived, valid or not.")
        self._requests = counter("requests_total", "Calls that ended, by status.", ("code",))
        self._duration = seconds("request", "From arrival to end of a call.", buckets.WAIT_SECONDS)
        self._in_flight = gauge("requests_in_flight", "Requests inside the router.")
        self._queued = gauge("requests_queued", "Requests in flight that wait for a worker.")
        self._queue_wait = seconds("queue_wait", "Wait for workers.", buckets.WAIT_SECONDS)
        self._first_token = seconds(
            "time_to_first_token", "From arrival to the first delta.", buckets.WAIT_SECONDS
        )
        self._inter_token = seconds(
            "inter_token", "Between two tokens of one stream.", buckets.STEP_SECONDS
        )
        self._prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of finished requests.")
        self._generated_tokens = counter("generated_tokens_total", "Tokens sent to clients.")
        self._handoff_size = counter(
            "handoff_bytes_total", "State that moved from prefill to decode.", ("transport",)
        )
        self._handoff_time = seconds(
            "handoff", "From the start of a push to its seal.", buckets.HANDOFF_SECONDS
        )
        self._failovers = counter(
            "failovers_total",
            "Attempts at a request that failed, and were followed by another, by kind of error.",
            ("cause",),
        )
        self._stall = seconds(
            "failover_stall",
            "Between two tokens of a stream with a failure between them.",
            buckets.WAIT_SECONDS,
        )
        self._workers = gauge("workers", "Live workers.", ("role",))
        for role in Role:
            # Zero from the start: an absent series cannot raise an alarm.
            self._workers.labels(role.value).set(0)

    def request_started(self) -> None:
        """A call arrived; valid or not."""
        self._received.inc()

    def request_finished(self, code: str, seconds: float) -> None:
        """A call ended with a gRPC status name."""
        self._requests.labels(code).inc()
        self._duration.observe(seconds)

    def tokens(self, prompt: int, generated: int) -> None:
        """Tokens of one completed request."""
        self._prompt_tokens.inc(prompt)
        self._generated_tokens.inc(generated)

    def queued(self, seconds: float) -> None:
        """A request found its workers after this wait."""
        self._queue_wait.observe(seconds)

    def first_token(self, seconds: float) -> None:
        """From a request's arrival to its first delta."""
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        """Between two neighbouring tokens of one stream."""
        self._inter_token.observe(seconds)

    def handoff(self, transport: str, size_bytes: int, seconds: float) -> None:
        """A state went from a prefill to a decode worker."""
        self._handoff_size.labels(transport).inc(size_bytes)
        self._handoff_time.observe(seconds)

    def failed_over(self, cause: str) -> None:
        """An attempt failed of this kind of error, and another one follows."""
        self._failovers.labels(cause).inc()

    def resumed(self, seconds: float) -> None:
        """A stream goes on behind a failure, so long after the token before it."""
        self._stall.observe(seconds)

    def occupancy(self, in_flight: int, waiting: int) -> None:
        """Requests inside the router, and those among them that wait for a worker."""
        self._in_flight.set(in_flight)
        self._queued.set(waiting)

    def workers(self, role: str, count: int) -> None:
        """Live workers of a role."""
        self._workers.labels(role).set(count)


class WorkerMetrics:
    """Implements ``worker/meter.py: WorkerMeter``, plus gauges for load. Thread safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, help: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"stateferry_worker_{name}", help, labels, registry=registry)

        def histogram(
            name: str, help: str, bounds: tuple[float, ...], labels: tuple[str, ...] = ()
        ) -> Histogram:
            full = f"stateferry_worker_{name}"
            return Histogram(full, help, labels, buckets=bounds, registry=registry)

        self._active = gauge("requests_active", "Requests held, in any phase.")
        self._queued = gauge("requests_queued", "Requests accepted but not begun.")
        self._queued_tokens = gauge("tokens_queued", "Prompt tokens still to compute.")
        self._slots = gauge("state_slots", "State slots.", ("status",))
        self._tail_pages = gauge("tail_pages", "Tail pages.", ("status",))
        self._kv_pages = gauge("kv_pages", "Pages of keys and values.", ("status",))
        self._pool_size = gauge("pool_bytes", "Memory of one pool, in use or not.", ("pool",))
        self._step_time = histogram(
            "step_seconds", "One forward pass.", buckets.STEP_SECONDS, ("kind",)
        )
        self._gap_time = histogram(
            "step_gap_seconds",
            "Between two forward passes, when the next one was there to be run.",
            buckets.STEP_SECONDS,
            ("kind",),
        )
        self._step_rows = histogram(
            "step_sequences", "Sequences in one forward pass.", buckets.BATCH_ROWS, ("kind",)
        )
        self._step_tokens = histogram(
            "step_tokens", "Tokens in one forward pass.", buckets.BATCH_TOKENS, ("kind",)
        )
        self._handoffs = Counter(
            "stateferry_worker_handoffs_total",
            "Hand-offs that ended, sealed or failed.",
            ("result",),
            registry=registry,
        )
        self._handoff_time = histogram(
            "handoff_seconds",
            "A sealed hand-off: the whole push on prefill, manifest to seal on decode.",
            buckets.HANDOFF_SECONDS,
        )
        self._handoff_size = histogram(
            "handoff_bytes", "Payload of a sealed hand-off.", buckets.HANDOFF_BYTES
        )
        self._preemptions = Counter(
            "stateferry_worker_preemptions_total",
            "Decoding sequences that had to pause for one of higher priority.",
            registry=registry,
        )
        self._recomputed = Counter(
            "stateferry_worker_recomputed_tokens_total",
            "Tokens of preempted sequences that were computed again: the cache had lost them.",
            registry=registry,
        )
        for result in ("sealed", "failed"):
            self._handoffs.labels(result)

    def observe_step(self, kind: str, seconds: float, rows: int, tokens: int) -> None:
        """One forward pass. ``kind`` is extend or decode; ``rows`` counts sequences."""
        self._step_time.labels(kind).observe(seconds)
        self._step_rows.labels(kind).observe(rows)
        self._step_tokens.labels(kind).observe(tokens)

    def observe_gap(self, kind: str, seconds: float) -> None:
        """The engine had nothing to run before such a pass, though there was work."""
        self._gap_time.labels(kind).observe(seconds)

    def preempted(self, sequences: int, recomputed_tokens: int) -> None:
        """More sequences had to pause; more tokens are computed again after a pause."""
        self._preemptions.inc(sequences)
        self._recomputed.inc(recomputed_tokens)

    def handoff_sealed(self, size_bytes: int, seconds: float) -> None:
        """A hand-off is complete."""
        self._handoffs.labels("sealed").inc()
        self._handoff_time.observe(seconds)
        self._handoff_size.observe(size_bytes)

    def handoff_failed(self) -> None:
        """A hand-off broke, or what arrived could not be used. Not for cancelled requests."""
        self._handoffs.labels("failed").inc()

    def set_pool_sizes(self, sizes: PoolSizes) -> None:
        """What the pools were cut to at start."""
        for pool, count, each in (
            ("state_slots", sizes.state_slots, sizes.state_slot_bytes),
            ("tail_pages", sizes.tail_pages, sizes.tail_page_bytes),
            ("kv_pages", sizes.kv_pages, sizes.kv_page_bytes),
        ):
            self._pool_size.labels(pool).set(count * each)

    def set_pools(self, state_slots: PoolCount, tail_pages: PoolCount, kv_pages: PoolCount) -> None:
        """Occupancy of the pools."""
        for gauge, count in (
            (self._slots, state_slots),
            (self._tail_pages, tail_pages),
            (self._kv_pages, kv_pages),
        ):
            gauge.labels("free").set(count.free)
            gauge.labels("used").set(count.total - count.free)

    def set_requests(self, active: int, queued: int, queued_tokens: int = 0) -> None:
        """Requests held and waiting, and the prompt tokens that wait with them."""
        self._active.set(active)
        self._queued.set(queued)
        self._queued_tokens.set(queued_tokens)

    def set_load(self, load: WorkerLoad) -> None:
        """Everything that a heartbeat says: call it with each report."""
        self.set_requests(load.active_requests, load.queued_requests, load.queued_tokens)
        self.set_pools(load.state_slots, load.tail_pages, load.kv_pages)
