"""The engine around a model: with hardly any room, and with a request that cannot go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from stateferry.core.errors import GuideBroke
from stateferry.core.guide import Guide, GuideKind
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from support.local_engine import local_engine
from support.tiny_hybrid import write_tiny_hybrid


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hybrid(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("context", [2, 31, 32, 33, 34, 65])
def test_contexts_about_as_long_as_the_grid(hybrid: Path, context: int) -> None:
    engine, parts = local_engine(hybrid, max_requests=1, grid=32, max_context_tokens=context)
    wide, _ = local_engine(hybrid, grid=32)
    request = GenerationRequest(
        "r",
        (5,) * (context - context // 2),
        SamplingParams(0.0, 0, 1.0, 0, None),
        StopConditions(context // 2, 0, frozenset()),
    )
    output = engine.generate([request])["r"]
    assert output.token_ids == wide.generate([request])["r"].token_ids
    assert parts.cache.kv_pages.free == parts.cache.kv_pages.total == -(-context // 32)
    parts.cache.check_conserved()


def test_a_request_that_cannot_go_on_leaves_the_others_alone(hybrid: Path) -> None:
    engine, parts = local_engine(hybrid, grid=32)
    hard = Guide(GuideKind.REGEX, "(.{1,1000}){1,1000}")
    # A letter again and again meets the limit of the matcher.
    biases = ((3 + ord("a") - ord("!"), 100.0),)
    plain = SamplingParams(0.0, 0, 1.0, 0, None)
    guided = SamplingParams(0.0, 0, 1.0, 0, None, logit_bias=biases, guide=hard)
    stop = StopConditions(120, 0, frozenset())
    alone = engine.generate([GenerationRequest("p", (5, 6, 7), plain, stop)])["p"]
    engine.submit(GenerationRequest("plain", (5, 6, 7), plain, stop))
    engine.submit(GenerationRequest("guided", (5, 6, 7), guided, stop))
    with pytest.raises(GuideBroke):
        while engine.num_unfinished:
            engine.step()
    assert list(engine.outputs) == ["plain"]
    while engine.num_unfinished:
        engine.step()
    assert engine.outputs["plain"].token_ids == alone.token_ids
    assert parts.cache.kv_pages.free == parts.cache.kv_pages.total
    parts.cache.check_conserved()
