"""What came of a worker's drafts, read when somebody scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class DraftTotals:
    """Monotonic totals of one worker: guesses made and right, verifications and their seconds,
    seconds of guessing, and of how many drafts so many guesses were right."""

    drafted: int
    accepted: int
    verifications: int
    verify_s: float
    draft_s: float
    by_accepted: Mapping[int, int]
    most_guesses: int


class DraftCollector(Collector):
    """``totals`` is called on the exporter's thread."""

    def __init__(self, totals: Callable[[], DraftTotals]) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        """All families, as they are now."""
        totals = self._totals()
        tokens = CounterMetricFamily(
            "stateferry_worker_draft_tokens",
            "Guessed tokens that were verified, and those of them that were right.",
            labels=("event",),
        )
        tokens.add_metric(("drafted",), totals.drafted)
        tokens.add_metric(("accepted",), totals.accepted)
        yield tokens
        yield CounterMetricFamily(
            "stateferry_worker_verifications", "Steps with drafts.", value=totals.verifications
        )
        seconds = CounterMetricFamily(
            "stateferry_worker_speculation_seconds",
            "Time of steps with drafts, and of guessing.",
            labels=("part",),
        )
        seconds.add_metric(("verify",), totals.verify_s)
        seconds.add_metric(("draft",), totals.draft_s)
        yield seconds
        yield _lengths(totals)


def _lengths(totals: DraftTotals) -> HistogramMetricFamily:
    counted, buckets = 0, []
    for length in range(totals.most_guesses + 1):
        counted += totals.by_accepted.get(length, 0)
        buckets.append((f"{length}.0", float(counted)))
    return HistogramMetricFamily(
        "stateferry_worker_accepted_draft_tokens",
        "Right guesses of one draft.",
        buckets=[*buckets, ("+Inf", float(counted))],
        sum_value=float(totals.accepted),
    )
