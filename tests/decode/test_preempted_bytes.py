"""A decoding sequence that is pushed aside goes on with the tokens, and the bytes of their
log-probabilities, that it would have had undisturbed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from stateferry.config import CacheSection, SpeculationSection
from stateferry.core.guide import Guide, GuideKind
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import Penalties, SamplingParams, StopConditions
from stateferry.worker.parts import EngineParts
from support.decode_driver import DecodeDriver
from support.local_engine import local_engine
from support.tiny_hybrid import write_tiny_hybrid
from support.tiny_model import write_tiny_model

GRID = 32
NEVER = frozenset[int]()
GREEDY = SamplingParams(0.0, 0, 1.0, 1, 0)
Mode = Literal["in turn", "overlap", "drafts"]
MODES: tuple[Mode, ...] = ("in turn", "overlap", "drafts")
SAMPLINGS = {
    "greedy": GREEDY,
    "seeded": SamplingParams(0.9, 20, 0.95, 77, 3),
    "penalties": SamplingParams(0.7, 0, 1.0, 5, 0, penalties=Penalties(1.3, 0.4, 0.3)),
    "guide": replace(GREEDY, guide=Guide(GuideKind.REGEX, "(ab|cd|ef){80,90}")),
}


@pytest.fixture(scope="module", params=["Mamba2", "FalconH1", "NemotronH"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "tiny"
    if request.param == "Mamba2":
        return write_tiny_model(target, chunk_size=GRID)
    return write_tiny_hybrid(target, request.param)


def driver(
    model_dir: Path, mode: Mode, cache: CacheSection | None = None, sequences: int = 1
) -> DecodeDriver:
    _, parts = local_engine(
        model_dir,
        max_requests=sequences,
        grid=GRID,
        max_context_tokens=512,
        cache=cache or CacheSection(memory_bytes=1 << 20),
        speculation=SpeculationSection(drafter="ngram" if mode == "drafts" else "off"),
    )
    return DecodeDriver(parts, max_in_flight=2 if mode == "overlap" else 1)


def low(sampling: SamplingParams, prompt_len: int = 50, max_tokens: int = 160) -> GenerationRequest:
    ids = tuple(random.Random(prompt_len).choices(range(3, 259), k=prompt_len))
    stop = StopConditions(max_tokens, 0, NEVER)
    return GenerationRequest("low", ids, sampling, stop, priority=-1)


def high(name: str = "high", max_tokens: int = 5, priority: int = 1) -> GenerationRequest:
    ids = tuple(random.Random(name).choices(range(3, 259), k=40))
    return GenerationRequest(
        name, ids, GREEDY, StopConditions(max_tokens, 0, NEVER), priority=priority
    )


def text(made: DecodeDriver, name: str) -> list[object]:
    """Of each token its id and the bytes of all log-probabilities that came with it."""
    return [
        (t.token_id, float.hex(t.logprob or 0.0), [(o.token_id, o.logprob.hex()) for o in t.top])
        for t in made.tokens[name]
    ]


def check_books(parts: EngineParts) -> None:
    parts.cache.check_conserved()
    assert not parts.cache._held


def alone(model_dir: Path, request: GenerationRequest) -> list[object]:
    made = driver(model_dir, "in turn")
    made.ask(request)
    made.finish()
    check_books(made.parts)
    return text(made, request.request_id)


@pytest.fixture(scope="module")
def undisturbed(model_dir: Path) -> dict[str, list[object]]:
    return {kind: alone(model_dir, low(sampling)) for kind, sampling in SAMPLINGS.items()}


def run_until(made: DecodeDriver, name: str, tokens: int) -> None:
    while made.count(name) < tokens:
        assert made.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [1, 8, 31, 127])
@pytest.mark.parametrize("kind", SAMPLINGS)
def test_it_goes_on_with_the_same_bytes(
    model_dir: Path, undisturbed: dict[str, list[object]], mode: Mode, at: int, kind: str
) -> None:
    made = driver(model_dir, mode)
    made.ask(low(SAMPLINGS[kind]))
    run_until(made, "low", at)
    made.ask(high())
    before = made.count("low")
    made.finish("high")
    # What was in flight is not thrown away, and nothing more is begun.
    assert before <= made.count("low") < len(undisturbed[kind])
    assert made.scheduler.counts.preempted == 1
    made.finish()
    assert text(made, "low") == undisturbed[kind]
    assert text(made, "high") == alone(model_dir, high())
    # Its state was there: only the token that nothing had consumed was left to do.
    assert made.extended == [1] and made.scheduler.counts.recomputed_tokens == 0
    check_books(made.parts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["penalties", "guide"])
def test_with_its_state_lost_it_is_computed_again(
    model_dir: Path, undisturbed: dict[str, list[object]], mode: Mode, kind: str
) -> None:
    made = driver(model_dir, mode)
    made.ask(low(SAMPLINGS[kind]))
    run_until(made, "low", 75)
    made.ask(high())
    run_until(made, "high", 2)
    lost = 50 + made.count("low")
    made.parts.cache.prefixes.clear()
    made.finish()
    assert text(made, "low") == undisturbed[kind]
    # In slices, between which others may step; the last one consumes the newest token as well.
    assert sum(made.extended) == lost and len(made.extended) > 1
    assert made.scheduler.counts.recomputed_tokens == lost - 1
    check_books(made.parts)


@pytest.mark.parametrize("mode", MODES)
def test_without_a_cache_as_well(
    model_dir: Path, undisturbed: dict[str, list[object]], mode: Mode
) -> None:
    made = driver(model_dir, mode, CacheSection(enabled=False))
    made.ask(low(SAMPLINGS["seeded"]))
    run_until(made, "low", 20)
    made.ask(high())
    made.finish()
    assert text(made, "low") == undisturbed["seeded"]
    assert made.scheduler.counts.recomputed_tokens >= 50 + 19
    check_books(made.parts)


@pytest.mark.parametrize("mode", MODES)
def test_again_and_again_beside_others(
    model_dir: Path, undisturbed: dict[str, list[object]], mode: Mode
) -> None:
    """Four sequences on two places, pushed aside at any moment."""
    made = driver(model_dir, mode, sequences=2)
    kinds = dict(zip(("a", "b"), ("penalties", "seeded"), strict=True))
    for name, kind in kinds.items():
        made.ask(replace(low(SAMPLINGS[kind]), request_id=name))
    rng = random.Random(mode)
    for number in range(9):
        for _ in range(rng.randrange(1, 18)):
            made.step()
        made.ask(high(f"high-{number}", max_tokens=rng.randrange(2, 9), priority=number % 3))
    made.finish()
    for name, kind in kinds.items():
        assert text(made, name) == undisturbed[kind]
    for number in range(9):
        name = f"high-{number}"
        assert len(made.tokens[name]) and made.scheduler.counts.preempted > 5
    check_books(made.parts)


def test_one_in_whose_favour_it_was_leaves_and_it_goes_on_at_once(
    model_dir: Path, undisturbed: dict[str, list[object]]
) -> None:
    made = driver(model_dir, "overlap")
    made.ask(low(SAMPLINGS["seeded"]))
    run_until(made, "low", 9)
    made.scheduler.admit("high", 100, 3, 0.0)
    made.grant()
    made.scheduler.abort("high")
    made.finish()
    assert made.scheduler.counts.preempted == 0
    assert text(made, "low") == undisturbed["seeded"]
    check_books(made.parts)
