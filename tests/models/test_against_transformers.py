"""Logits and greedy tokens against transformers' Mamba2ForCausalLM, fp32."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stateferry.bundled import bundled_model_dir
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.engine.forward_batch import DecodeBatch, DecodeInput, ExtendBatch, ExtendRow
from stateferry.models.registry import load_model
from stateferry.worker.parts import EngineParts
from stateferry_kernels.dispatch import select_kernels
from support.local_engine import local_engine

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4

# Each differs from the defaults below in what it names.
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "four groups": {"n_groups": 4, "state_size": 24},
    "short chunks, untied": {"chunk_size": 32, "tie_word_embeddings": False},
    "long chunks": {"chunk_size": 256, "num_hidden_layers": 1},
    "biases": {"use_bias": True, "n_groups": 2},
    "no conv bias": {"use_conv_bias": False, "head_dim": 32, "num_heads": 4},
    "time step limit": {"time_step_limit": (0.01, 0.3), "head_dim": 64, "num_heads": 2},
    "odd sizes": {
        "hidden_size": 72,
        "num_heads": 6,
        "head_dim": 24,
        "n_groups": 3,
        "conv_kernel": 3,
    },
}


def build(model_dir: Path, seed: int, **changes: Any) -> Any:
    """A random transformers model, saved to ``model_dir``."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": 317,
        "hidden_size": 64,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "num_hidden_layers": 2,
        "expand": 2,
        "n_groups": 1,
        "chunk_size": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**options)).eval()
    for name, parameter in model.named_parameters():
        # The library starts biases and norms at 0 and 1, where a mix-up would not show.
        if name.endswith(("bias", "norm.weight", "norm_f.weight")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(model_dir)
    return model


@pytest.fixture(params=CONFIGS, ids=list(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    number = list(CONFIGS).index(request.param)
    yield build(tmp_path, number, **CONFIGS[request.param]), tmp_path


@torch.inference_mode()
def theirs(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits of every position, (len(ids), vocab_size)."""
    logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


@torch.inference_mode()
def ours(parts: EngineParts, model: Any, ids: list[int], prompt_len: int) -> torch.Tensor:
    """Logits of the prompt's last position and of those after it, by one extend and decode rows."""
    request_id = "logits"
    assert parts.cache.reserve(request_id)
    lease, pool, grid = parts.cache.lease(request_id), parts.cache.pool, parts.grid
    batch = ExtendBatch((ExtendRow(lease, tuple(ids[:prompt_len]), None),))
    rows = [
        model.extend(
            torch.tensor(ids[:prompt_len]), batch.plan(grid), pool.layers, [prompt_len - 1]
        )
    ]
    batch.advance(grid)
    for token in ids[prompt_len:]:
        step = DecodeBatch((DecodeInput(lease, token, None),))  # type: ignore[arg-type]
        rows.append(model.decode(torch.tensor([token]), step.plan(grid), pool.layers))
        if (due := step.commit_plan(grid)) is not None:
            model.commit(due, pool.layers)
        step.advance(grid)
    parts.cache.release(request_id)
    return torch.cat(rows)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def edge_lengths(chunk: int, d_conv: int) -> list[int]:
    return sorted({1, d_conv - 1, chunk - 1, chunk, chunk + 1, 5 * chunk + 3})


def test_logits_of_prefill_and_decode(pair: tuple[Any, Path]) -> None:
    reference, model_dir = pair
    _, parts = local_engine(model_dir)
    model = load_model(model_dir, dtype=torch.float32, kernels=select_kernels())
    rng = random.Random(0)
    for length in edge_lengths(reference.config.chunk_size, reference.config.conv_kernel):
        ids = [rng.randrange(3, 317) for _ in range(length + 6)]
        expected = theirs(reference, ids)
        assert relative(ours(parts, model, ids, length), expected[length - 1 :]) < TOLERANCE


def greedy(engine: Any, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    requests = [
        GenerationRequest(
            f"greedy-{number}",
            tuple(prompt),
            SamplingParams(0.0, 0, 1.0, 0, None),
            StopConditions(max_tokens, 0, frozenset()),
        )
        for number, prompt in enumerate(prompts)
    ]
    outputs = engine.generate(requests)
    return [outputs[request.request_id].token_ids for request in requests]


def is_their_greedy(model: Any, prompt: list[int], tokens: list[int]) -> bool:
    """Whether each token is the likeliest after those before it, by one full forward.

    By induction that is greedy decoding. Not ``generate``: its cached step of this release ignores
    time_step_limit, so it disagrees with the library's own full forward.
    """
    logits = theirs(model, prompt + tokens)[len(prompt) - 1 : -1]
    return logits.argmax(-1).tolist() == tokens


def test_greedy_tokens_of_a_mixed_batch(pair: tuple[Any, Path]) -> None:
    reference, model_dir = pair
    engine, _ = local_engine(model_dir)
    rng = random.Random(1)
    lengths = edge_lengths(reference.config.chunk_size, reference.config.conv_kernel)
    prompts = [[rng.randrange(3, 317) for _ in range(length)] for length in lengths]
    for prompt, tokens in zip(prompts, greedy(engine, prompts, 24), strict=True):
        assert len(tokens) == 24
        assert is_their_greedy(reference, prompt, tokens)


BUNDLED_PROMPTS = 20


def test_bundled_model_20_prompts_of_64_tokens() -> None:
    model_dir = bundled_model_dir()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32
    ).eval()
    text = (model_dir.parent / "heldout_sample.txt").read_text(encoding="utf-8")
    ids: list[int] = tokenizer(text)["input_ids"]
    chunk = reference.config.chunk_size
    lengths = edge_lengths(chunk, reference.config.conv_kernel)
    rng = random.Random(2)
    lengths += [rng.randint(2, 2 * chunk) for _ in range(BUNDLED_PROMPTS - len(lengths))]
    starts = [rng.randrange(len(ids) - max(lengths)) for _ in lengths]
    prompts = [ids[s : s + n] for s, n in zip(starts, lengths, strict=True)]
    engine, parts = local_engine(model_dir)
    for prompt, tokens in zip(prompts, greedy(engine, prompts, 64), strict=True):
        assert len(tokens) == 64
        assert is_their_greedy(reference, prompt, tokens)
    model = load_model(model_dir, dtype=torch.float32, kernels=select_kernels())
    for prompt in prompts[: len(edge_lengths(chunk, 4))]:
        expected = theirs(reference, prompt)[-1:]
        assert relative(ours(parts, model, prompt, len(prompt)), expected) < TOLERANCE
