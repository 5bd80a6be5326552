"""Which tokens end a sequence, as a model's directory says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stateferry.core.errors import ModelError


def read_eos_token_ids(model_dir: Path, vocab_size: int) -> frozenset[int]:
    """End-of-sequence ids of a Hugging Face directory; may be empty. Raises ModelError."""
    # generation_config.json wins where it exists: it is where publishers list several ids.
    for name in ("generation_config.json", "config.json"):
        if not (model_dir / name).is_file():
            continue
        value = read_json_object(model_dir / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if type(token_id) is not int:
                raise ModelError(f"{name}: eos_token_id: {token_id!r} is not a token id")
        # An id outside the vocabulary can never be sampled, and workers refuse it as a stop id.
        return frozenset(i for i in ids if 0 <= i < vocab_size)
    return frozenset()


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError naming the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file.name}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file.name} does not hold an object")
    return content
