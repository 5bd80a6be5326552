"""Which files hold a model's weights, and a digest of them; without torch, for the router."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from stateferry.core.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SAMPLE_BYTES = 1 << 16
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a model. Raises ModelError when there are none, or when the index
    names anything but files of this directory."""
    index = model_dir / _INDEX
    if not index.is_file():
        if not (model_dir / _SINGLE).is_file():
            raise ModelError(
                f"{model_dir} holds neither {_SINGLE} nor {_INDEX}; pickled weights are not read"
            )
        return [model_dir / _SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a weight index: {error!r}") from error
    for name in names:
        inside = isinstance(name, str) and name == Path(name).name
        if not inside or not name.endswith(".safetensors") or not (model_dir / name).is_file():
            raise ModelError(f"{index} names {name!r}, which is no safetensors file beside it")
    return [model_dir / name for name in names]


def has_weights(model_dir: Path) -> bool:
    """Whether there are any: a router may be given configuration and tokenizer only."""
    return (model_dir / _SINGLE).is_file() or (model_dir / _INDEX).is_file()


def weights_fingerprint(model_dir: Path) -> str:
    """A digest that differs when the configuration or any tensor does, as far as is cheap.

    It covers each file's size, its whole header (names, shapes and places of all tensors) and up to
    64 KiB from the start, middle and end of every tensor, so it also sees a training that changed a
    few layers only. A full digest would read every byte a second time at start. This one guards
    against mistakes, not against forgery. Raises ModelError.
    """
    try:
        digest = hashlib.sha256((model_dir / "config.json").read_bytes())
        for path in weight_files(model_dir):
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            with path.open("rb") as file:
                _digest_file(digest, file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{model_dir} has no fingerprint: {error!r}") from error
    return digest.hexdigest()[:16]


def _digest_file(digest: hashlib._Hash, file: BinaryIO) -> None:
    """A safetensors file: 8 bytes of length, a JSON header, the tensors' bytes."""
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    header = file.read(length)
    digest.update(header)
    for name, entry in sorted(json.loads(header).items()):
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        last = max(begin, end - _SAMPLE_BYTES)
        for offset in sorted({begin, (begin + last) // 2, last}):
            file.seek(8 + length + offset)
            digest.update(file.read(min(_SAMPLE_BYTES, end - offset)))
