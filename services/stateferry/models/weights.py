"""Weights from safetensors files: mapped, converted tensor by tensor, every one accounted for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from stateferry.core.errors import ModelError

Progress = Callable[[int, int], None]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SAMPLE_BYTES = 1 << 16
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor a model wants: its shape, and the dtype to keep it in."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def load_weights(
    model_dir: Path,
    wanted: Mapping[str, TensorSpec],
    ignored: frozenset[str] = frozenset(),
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Load exactly the ``wanted`` tensors, by their names in the files.

    Files are memory-mapped, so no second copy of a file is held. ``progress`` gets (bytes done,
    bytes in all). Raises ModelError naming a tensor that is missing, unexpected (and not
    ``ignored``), of another shape, or not of a floating-point dtype.
    """
    files = weight_files(model_dir)
    total = sum(file.stat().st_size for file in files)
    loaded: dict[str, torch.Tensor] = {}
    done = 0
    for file in files:
        for name, tensor in _tensors(file):
            done += tensor.nbytes
            if progress is not None:
                progress(min(done, total), total)
            if name in ignored:
                continue
            if name in loaded or name not in wanted:
                raise ModelError(f"{file.name}: unexpected tensor {name}")
            loaded[name] = _converted(name, tensor, wanted[name])
    missing = sorted(set(wanted) - set(loaded))
    if missing:
        raise ModelError(f"{model_dir}: missing tensors {', '.join(missing[:5])} ({len(missing)})")
    if progress is not None:
        progress(total, total)
    return loaded


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


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (the handle is not a mapping)
                yield name, handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def _converted(name: str, tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    if tuple(tensor.shape) != spec.shape:
        raise ModelError(f"{name}: shape {tuple(tensor.shape)}, expected {spec.shape}")
    if not tensor.dtype.is_floating_point:
        raise ModelError(f"{name}: {tensor.dtype} is not a floating-point dtype")
    # A copy even when the dtype fits: a view would keep the whole file mapped, and page it in from
    # disk in the middle of a request.
    return tensor.to(spec.dtype, copy=True).contiguous()
