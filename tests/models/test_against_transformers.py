"""Logits and greedy tokens of every architecture against transformers' own, fp32 and bf16."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stateferry.bundled import bundled_model_dir
from stateferry.models.model import Model
from stateferry.models.registry import load_model
from stateferry_kernels.dispatch import select_kernels
from support.hf_models import CASES, CONFIGS, VOCAB, build, logits_of, transformers
from support.model_walk import ModelWalk

TOLERANCE = 1e-4

DECODED = 6
GREEDY = 64


@dataclass(frozen=True)
class Pair:
    """Their model, and the directory it was saved to."""

    reference: Any
    model_dir: Path

    def ours(self, dtype: torch.dtype = torch.float32) -> Model:
        return load_model(self.model_dir, dtype=dtype, kernels=select_kernels())


@pytest.fixture(scope="module", params=CASES, ids=[f"{a}: {name}" for a, name in CASES])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    architecture, name = request.param
    model_dir = tmp_path_factory.mktemp("model")
    number = CASES.index(request.param)
    return Pair(build(model_dir, architecture, number, **CONFIGS[architecture][name]), model_dir)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def edge_lengths(chunk: int) -> list[int]:
    return [1, 3, chunk - 1, chunk, chunk + 1, 3 * chunk + 5]


def random_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(count)]


def test_logits_of_prefill_and_decode(pair: Pair) -> None:
    model, rng = pair.ours(), random.Random(0)
    lengths = edge_lengths(model.chunk_size)
    prompts = [random_ids(rng, length + DECODED) for length in lengths]
    walk = ModelWalk(model, len(prompts))
    rows = [walk.extend({n: ids[: lengths[n]] for n, ids in enumerate(prompts)})]
    for step in range(DECODED):
        rows.append(walk.decode({n: ids[lengths[n] + step] for n, ids in enumerate(prompts)}))
    logits = torch.stack(rows, dim=1)
    for n, ids in enumerate(prompts):
        expected = logits_of(pair.reference, ids)[lengths[n] - 1 :]
        assert relative(logits[n], expected) < TOLERANCE, lengths[n]


def test_logits_of_a_prompt_in_pieces(pair: Pair) -> None:
    """Cut anywhere, a decode row between the pieces, another sequence beside it now and then."""
    model, rng = pair.ours(), random.Random(1)
    chunk = model.chunk_size
    ids, beside = random_ids(rng, 3 * chunk), random_ids(rng, 3 * chunk)
    expected = logits_of(pair.reference, ids)
    walk, done = ModelWalk(model, 2), 0
    while done < len(ids):
        most = min(chunk + 5, len(ids) - done)
        count = rng.choice((1, rng.randint(1, most)))
        batch = {0: ids[done : done + count]}
        if rng.random() < 0.5 and done + count < len(beside):
            batch[1] = beside[:count]
            beside = beside[count:]
        if count == 1 and len(batch) == 1:
            logits = walk.decode({0: ids[done]})
        else:
            logits = walk.extend(batch)
        done += count
        assert relative(logits[:1], expected[done - 1 : done]) < TOLERANCE, done


def test_greedy_tokens_of_a_mixed_batch(pair: Pair) -> None:
    model, rng = pair.ours(), random.Random(2)
    prompts = [random_ids(rng, length) for length in edge_lengths(model.chunk_size)]
    for prompt, tokens in zip(prompts, greedy(model, prompts), strict=True):
        assert len(tokens) == GREEDY
        assert is_their_greedy(pair.reference, prompt, tokens)


def greedy(model: Model, prompts: list[list[int]]) -> list[list[int]]:
    walk = ModelWalk(model, len(prompts))
    best = walk.extend(dict(enumerate(prompts))).argmax(-1).tolist()
    tokens = [[token] for token in best]
    for _ in range(GREEDY - 1):
        best = walk.decode(dict(enumerate(best))).argmax(-1).tolist()
        for own, token in zip(tokens, best, strict=True):
            own.append(token)
    return tokens


def is_their_greedy(reference: Any, prompt: list[int], tokens: list[int]) -> bool:
    """Whether each token is the likeliest after those before it, by one full forward. By induction
    that is greedy decoding."""
    logits = logits_of(reference, prompt + tokens)[len(prompt) - 1 : -1]
    return logits.argmax(-1).tolist() == tokens


def test_bf16_is_as_near_to_fp32_as_theirs(pair: Pair) -> None:
    """Row by row, our bf16 logits' distance from their fp32 ones, less the distance of their bf16
    ones: not above zero by more than chance allows.

    Rounding decides which experts a token goes to, so single rows may be anywhere.
    """
    model, rng = pair.ours(torch.bfloat16), random.Random(3)
    prompts = [random_ids(rng, 100) for _ in range(3)]
    exact = torch.cat([logits_of(pair.reference, ids) for ids in prompts])
    rounded = copy.deepcopy(pair.reference).to(torch.bfloat16)
    theirs = torch.cat([logits_of(rounded, ids) for ids in prompts])
    ours = ModelWalk(model, len(prompts)).extend(dict(enumerate(prompts)), rows=range(len(exact)))
    spread = (theirs - exact).square().mean(-1).sqrt()
    excess = (ours - exact).square().mean(-1).sqrt() - spread
    chance = 2 * float(excess.std()) / len(excess) ** 0.5
    assert float(excess.mean()) <= chance, f"{float(excess.mean() / spread.mean()):.3f} more"


BUNDLED_PROMPTS = 20


@pytest.mark.parametrize("name", ["hybrid_english", "mamba2_english"])
def test_bundled_model_20_prompts_of_64_tokens(name: str) -> None:
    model_dir = bundled_model_dir(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32
    ).eval()
    text = (model_dir.parent / "heldout_sample.txt").read_text(encoding="utf-8")
    ids: list[int] = tokenizer(text)["input_ids"]
    model = load_model(model_dir, dtype=torch.float32, kernels=select_kernels())
    chunk, rng = model.chunk_size, random.Random(4)
    lengths = edge_lengths(chunk)
    lengths += [rng.randint(2, 2 * chunk) for _ in range(BUNDLED_PROMPTS - len(lengths))]
    starts = [rng.randrange(len(ids) - max(lengths)) for _ in lengths]
    prompts = [ids[s : s + n] for s, n in zip(starts, lengths, strict=True)]
    for prompt, tokens in zip(prompts, greedy(model, prompts), strict=True):
        assert is_their_greedy(reference, prompt, tokens)
