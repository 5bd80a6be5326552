"""Weights from safetensors files: mapped, converted tensor by tensor, every one accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from stateferry.core.errors import ModelError
from stateferry.core.weight_files import weight_files

Progress = Callable[[int, int], None]


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
