"""Prompts of two kinds: text that answers repeat, and text that they do not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer

from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions

REPETITIVE, HELD_OUT, OPEN = "repetitive", "held-out", "held-out, sampled"
# Characters.
_PASSAGE, _SENTENCE = 300, (60, 140)
_PER_PROMPT, _TIMES = 3, 4


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts, as many as there are in the largest batch, and how they are answered."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    temperature: float

    def requests(self, batch: int, output_tokens: int, seed: int) -> list[GenerationRequest]:
        """The first ``batch``; every answer has ``output_tokens``."""
        stop = StopConditions(output_tokens, 0, frozenset())
        return [
            GenerationRequest(
                f"{self.name} {number}",
                ids,
                SamplingParams(self.temperature, 0, 1.0, seed + number, None),
                stop,
            )
            for number, ids in enumerate(self.prompts[:batch])
        ]


def tasks(model_dir: Path, text_file: Path | None, count: int, seed: int) -> list[Task]:
    """Of the passages of a text, the bundled held-out one if none is given. A repetitive prompt is
    three sentences, four times over: an answer that goes on with them is what an edit or a summary
    mostly is, a copy."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    text = (
        resources.files("stateferry.bundled").joinpath("heldout_sample.txt").read_text("utf-8")
        if text_file is None
        else text_file.read_text(encoding="utf-8")
    )
    passages = [p for p in text.split("\n\n") if len(p) >= _PASSAGE]
    sentences = [
        f"{s.strip()}."
        for p in text.split("\n\n")
        for s in p.replace("\n", " ").split(".")
        if _SENTENCE[0] <= len(s) <= _SENTENCE[1]
    ]
    if len(passages) < count or len(sentences) < _PER_PROMPT * count:
        raise ValueError(f"{len(passages)} passages and {len(sentences)} sentences are too few")
    rng = random.Random(seed)
    rng.shuffle(passages)
    rng.shuffle(sentences)

    def encoded(texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(tokenizer.encode(one).ids) for one in texts)

    blocks = [" ".join(sentences[_PER_PROMPT * n :][:_PER_PROMPT]) for n in range(count)]
    repeated = encoded(["\n\n".join([block] * _TIMES) + "\n\n" for block in blocks])
    plain = encoded([passage[: 3 * _PASSAGE] for passage in passages[:count]])
    return [
        Task(REPETITIVE, repeated, 0.0),
        Task(HELD_OUT, plain, 0.0),
        Task(OPEN, plain, 1.0),
    ]
