"""What is told of drafts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from stateferry.telemetry.draft_metrics import DraftCollector, DraftTotals


def test_totals_and_lengths() -> None:
    registry = CollectorRegistry()
    totals = DraftTotals(
        drafted=20,
        accepted=9,
        verifications=4,
        verify_s=0.5,
        draft_s=0.25,
        by_accepted={0: 1, 2: 2, 3: 0, 5: 1},
        most_guesses=5,
    )
    registry.register(DraftCollector(lambda: totals))
    page = generate_latest(registry).decode()
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    name = "stateferry_worker_draft_tokens_total"
    assert (values[name, "drafted"], values[name, "accepted"]) == (20, 9)
    assert values["stateferry_worker_verifications_total",] == 4
    assert values["stateferry_worker_speculation_seconds_total", "verify"] == 0.5
    name = "stateferry_worker_accepted_draft_tokens"
    counted = [values[f"{name}_bucket", bound] for bound in ("0.0", "1.0", "2.0", "5.0", "+Inf")]
    assert counted == [1, 1, 3, 4, 4]
    assert (values[f"{name}_count",], values[f"{name}_sum",]) == (4, 9)
