"""The two halves of a pass: planned with the books, run with the pools."""

from __future__ import annotations

import pytest
import torch

from stateferry.cache.page_copy import PageCopy
from stateferry.core.errors import GuideBroke
from stateferry.core.sampling import SamplingParams
from stateferry.engine import runner as runner_module
from stateferry.engine.forward_batch import (
    DecodeBatch,
    DecodeInput,
    ExtendBatch,
    ExtendRow,
    PendingToken,
    SampleSpec,
)
from stateferry.engine.rules import SequenceRules
from stateferry.engine.sampler import sample
from stateferry.worker.parts import EngineParts
from support.local_engine import local_engine
from support.tiny_hybrid import CHUNK, write_tiny_hybrid


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> EngineParts:
    model_dir = write_tiny_hybrid(tmp_path_factory.mktemp("model") / "tiny")
    _, parts = local_engine(model_dir, max_requests=4)
    return parts


def spec(index: int) -> SampleSpec:
    return SampleSpec(SamplingParams(0.0, 0, 1.0, 0, None), index)


def decoded(parts: EngineParts, name: str, planned_ahead: int) -> list[int]:
    """Tokens of one sequence, with so many steps planned before the first of them runs."""
    assert parts.cache.reserve(name, 4 * CHUNK)
    lease, runner = parts.cache.lease(name), parts.runner
    prompt = tuple(range(5, 5 + CHUNK - 3))
    [first] = runner.extend(ExtendBatch((ExtendRow(lease, prompt, spec(0)),)))()
    assert first is not None
    tokens, token = [first.token_id], PendingToken(first.token_id)
    for _ in range(12 // planned_ahead):
        launches = []
        for _ in range(planned_ahead):
            row = DecodeInput(lease, token, spec(1))
            token = row.sampled
            launches.append(runner.decode(DecodeBatch((row,))))
        for launch in launches:
            [sampled] = launch()
            assert sampled is not None
            tokens.append(sampled.token_id)
    parts.cache.release(name)
    return tokens


def test_steps_may_be_planned_before_their_tokens_are_known(parts: EngineParts) -> None:
    """Past a grid point, which the plans alone cross beforehand."""
    tokens = decoded(parts, "one", 1)
    assert len(set(tokens)) > 1
    assert decoded(parts, "two", 2) == decoded(parts, "many", 6) == tokens


def test_copies_that_failed_are_made_by_the_next_launch(
    parts: EngineParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence that the failed step did not touch may be waiting for them."""
    copies = [PageCopy("tail", 0, n, 1) for n in (1, 2, 3)]
    made: list[PageCopy] = []

    def fails_at_the_second(_: object, due: tuple[PageCopy, ...]) -> None:
        if len(made) == 1 and not failed:
            failed.append(True)
            raise RuntimeError("bad weather")
        made.extend(due)

    failed: list[bool] = []
    monkeypatch.setattr(runner_module, "run_copies", fails_at_the_second)
    with pytest.raises(RuntimeError, match="bad weather"):
        parts.runner.copy(copies[:2])
    parts.runner.copy(copies[2:])
    assert made == copies


def test_a_launch_does_not_touch_leases(parts: EngineParts) -> None:
    assert parts.cache.reserve("a", 2 * CHUNK)
    lease = parts.cache.lease("a")
    launch = parts.runner.extend(ExtendBatch((ExtendRow(lease, (5,) * (CHUNK + 1), spec(0)),)))
    planned = (lease.position, lease.state_slot, lease.next_slot)
    assert planned[0] == CHUNK + 1
    launch()
    assert (lease.position, lease.state_slot, lease.next_slot) == planned
    parts.cache.release("a")


def test_the_step_behind_a_failure_does_not_rename_it() -> None:
    """It was planned before the failure was known, and meets rules that missed a token."""
    rules = SequenceRules(SamplingParams(0.0, 0, 1.0, 0, None), None, None)
    rules.failure = GuideBroke("too complex")
    late = SampleSpec(SamplingParams(0.0, 0, 1.0, 0, None), 2, rules=rules)
    assert sample(torch.zeros(1, 8), [late]) == [None]
    assert isinstance(rules.failure, GuideBroke)
