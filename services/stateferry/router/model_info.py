"""What the router must know of a model, read from its directory without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stateferry.config import ModelSection
from stateferry.core.eos import read_eos_token_ids, read_json_object
from stateferry.core.errors import HandshakeMismatch, ModelError
from stateferry.core.fingerprint import Fingerprint
from stateferry.core.weight_files import has_weights, weights_fingerprint
from stateferry.core.worker import WorkerDescription


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """``max_context_tokens`` counts prompt and generated tokens of one request together."""

    name: str
    vocab_size: int
    max_context_tokens: int
    grid_tokens: int
    eos_token_ids: frozenset[int]
    weights: str | None
    dtype: str

    def check_serves(self, worker: WorkerDescription, other: Fingerprint | None) -> None:
        """Raises HandshakeMismatch naming what the worker serves differently: a client must get the
        same tokens from every worker.

        What the router cannot know (the kernels' numerics; the weights, where it has none) is held
        to ``other``, a worker that it has already, None when it has none.
        """
        theirs = worker.fingerprint
        other = other or theirs
        for field, mine, its in (
            ("model", self.name, theirs.model),
            ("vocab_size", self.vocab_size, worker.vocab_size),
            ("weights", self.weights or other.weights, theirs.weights),
            ("grid", self.grid_tokens, theirs.grid),
            ("dtype", self.dtype, theirs.dtype),
            ("numerics", other.numerics, theirs.numerics),
        ):
            if mine != its:
                raise HandshakeMismatch(field, mine, its)


def read_model_info(model_dir: Path, section: ModelSection) -> ModelInfo:
    """Read a Hugging Face directory. Raises ModelError naming the file and the option."""
    config = read_json_object(model_dir / "config.json")
    vocab_size = _positive(config, "vocab_size")
    return ModelInfo(
        name=section.name or model_dir.name,
        vocab_size=vocab_size,
        max_context_tokens=section.max_context_tokens,
        grid_tokens=section.grid_tokens or _chunk_size(config),
        eos_token_ids=read_eos_token_ids(model_dir, vocab_size),
        weights=weights_fingerprint(model_dir) if has_weights(model_dir) else None,
        dtype=section.dtype,
    )


def _chunk_size(config: dict[str, Any]) -> int:
    for option in ("chunk_size", "mamba_chunk_size"):
        if option in config:
            return _positive(config, option)
    raise ModelError("config.json: has no chunk_size; set model.grid_tokens instead")


def _positive(config: dict[str, Any], option: str) -> int:
    value = config.get(option)
    if type(value) is not int or value < 1:
        raise ModelError(f"config.json: {option} is {value!r}, not a positive number")
    return value
