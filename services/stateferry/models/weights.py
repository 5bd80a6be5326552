"""Weights from safetensors files: mapped, converted tensor by tensor, every one accounted for.

A model declares the tensors it computes with, and of which stored tensors each consists. Then the
files are streamed once, and every stored tensor is converted straight into its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from stateferry.core.errors import ModelError
from stateferry.core.weight_files import weight_files

Progress = Callable[[int, int], None]
Place = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor, and the piece of ours that it fills.

    ``scale`` multiplies it before it is rounded to our dtype: a number, or one fp32 value per row.
    ``accumulate`` adds it to what is there, in our dtype.
    """

    name: str
    place: Place = ()
    scale: float | torch.Tensor = 1.0
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    accumulate: bool = False


Layout = Sequence[Part]


@dataclass(slots=True)
class _Target:
    """One of our tensors and the layouts it may be stored in, any one of which is enough."""

    tensor: torch.Tensor
    layouts: tuple[tuple[Part, ...], ...]
    required: bool
    is_projection: bool
    loaded: set[str] = field(default_factory=set)


class WeightTable:
    """The tensors of a model that is being built. Those handed out hold nothing until ``fill``.

    With ``keep_narrow``, projections of an fp32 model that bf16 holds exactly, as of a checkpoint
    that was stored so, are bf16 once they are filled: the same numbers in half the memory.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        keep_narrow: bool = False,
    ) -> None:
        self.dtype = dtype
        self._keep_narrow = keep_narrow
        self._device = device
        self._targets: list[_Target] = []

    def tensor(
        self, shape: tuple[int, ...], *layouts: Layout, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A tensor made of stored ones, in the activation dtype unless said otherwise.

        What no part covers is zero.
        """
        zeros = torch.zeros(shape, dtype=dtype or self.dtype, device=self._device)
        return self._declare(zeros, layouts, True)

    def projection(self, shape: tuple[int, int], *layouts: Layout) -> torch.Tensor:
        """A matrix (outputs, inputs) that only ``linear`` reads, and nobody a part of."""
        zeros = torch.zeros(shape, dtype=self.dtype, device=self._device)
        return self._declare(zeros, layouts, True, is_projection=True)

    def embedding(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """Rows that are looked up, and may be the output projection as well."""
        return self.projection(shape, [Part(name)])

    def whole(
        self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A tensor that is stored as it is."""
        return self.tensor(shape, [Part(name)], dtype=dtype)

    def head(self, name: str, embedding: torch.Tensor, tied: bool) -> OutputHead:
        """The output projection, which a tied model may store or leave out."""
        own = torch.zeros_like(embedding)
        self._declare(own, [[Part(name)]], not tied, is_projection=True)
        return OutputHead(own, embedding, self._targets[-1])

    def _declare(
        self,
        tensor: torch.Tensor,
        layouts: Sequence[Layout],
        required: bool,
        is_projection: bool = False,
    ) -> torch.Tensor:
        self._targets.append(_Target(tensor, tuple(map(tuple, layouts)), required, is_projection))
        return tensor

    def fill(
        self,
        model_dir: Path,
        *,
        renames: Sequence[tuple[str, str]] = (),
        ignored: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        """Load every declared tensor.

        ``renames`` are (pattern, replacement) and turn other spellings of stored names into the
        declared ones, ``ignored`` are patterns of stored names that serving has no use for. Files
        are memory-mapped, so no second copy of a file is held. ``progress`` gets (bytes done, bytes
        in all). Raises ModelError naming a tensor that is missing, unexpected, stored twice, of
        another shape, or not of a floating-point dtype.
        """
        wanted = self._wanted()
        files = weight_files(model_dir)
        total = sum(file.stat().st_size for file in files)
        done = 0
        for file in files:
            for stored, tensor in _tensors(file):
                done += tensor.nbytes
                if progress is not None:
                    progress(min(done, total), total)
                if any(re.search(pattern, stored) for pattern in ignored):
                    continue
                name = _renamed(stored, renames)
                if name not in wanted:
                    raise ModelError(f"{file.name}: unexpected tensor {stored}")
                for target, part in wanted[name]:
                    _fill_part(stored, tensor, target, part)
        self._check_complete(model_dir)
        if self._keep_narrow and self.dtype is torch.float32:
            for target in self._targets:
                if target.is_projection:
                    _narrow_if_exact(target.tensor)
        if progress is not None:
            progress(total, total)

    def _wanted(self) -> dict[str, list[tuple[_Target, Part]]]:
        wanted: dict[str, list[tuple[_Target, Part]]] = {}
        for target in self._targets:
            for layout in target.layouts:
                for part in layout:
                    wanted.setdefault(part.name, []).append((target, part))
        return wanted

    def _check_complete(self, model_dir: Path) -> None:
        missing: list[str] = []
        for target in self._targets:
            layouts = [{part.name for part in layout} for layout in target.layouts]
            complete = [names for names in layouts if names <= target.loaded]
            if not complete and (target.required or target.loaded):
                absent: list[list[str]] = [sorted(names - target.loaded) for names in layouts]
                nearest: list[str] = min(absent, key=len)
                missing += nearest
            elif complete and target.loaded != complete[0]:
                names = ", ".join(sorted(target.loaded)[:5])
                raise ModelError(f"{model_dir}: one weight is stored in two ways: {names}")
        if missing:
            shown = ", ".join(missing[:5])
            raise ModelError(f"{model_dir}: missing tensors {shown} ({len(missing)} in all)")


@dataclass(frozen=True, slots=True)
class OutputHead:
    """An output projection that may turn out to be the embedding."""

    own: torch.Tensor
    embedding: torch.Tensor
    target: _Target

    def weight(self) -> torch.Tensor:
        """(vocab_size, d_model), once the table is filled.

        A configuration may promise a tie that the files do not keep. What is stored counts.
        """
        own, embedding = self.own, self.embedding
        if not self.target.loaded:
            return embedding
        same = own.dtype is embedding.dtype and torch.equal(own, embedding)
        return embedding if same else own


def _narrow_if_exact(tensor: torch.Tensor) -> None:
    """Whoever holds the tensor has it in bf16 then."""
    narrow = tensor.to(torch.bfloat16)
    if torch.equal(narrow.to(tensor.dtype), tensor):
        tensor.data = narrow


def _renamed(name: str, renames: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (the handle is not a mapping)
                yield name, handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def _fill_part(stored: str, tensor: torch.Tensor, target: _Target, part: Part) -> None:
    if part.name in target.loaded:
        raise ModelError(f"{stored}: stored twice, as {part.name}")
    if not tensor.dtype.is_floating_point:
        raise ModelError(f"{stored}: {tensor.dtype} is not a floating-point dtype")
    place = target.tensor[part.place] if part.place else target.tensor
    # A depthwise convolution is stored with a middle dimension of one.
    shape = tuple(place.shape)
    if tuple(tensor.shape) not in {shape, (*shape[:1], 1, *shape[1:])}:
        raise ModelError(f"{stored}: shape {tuple(tensor.shape)}, expected {shape}")
    values = tensor.reshape(shape)
    if isinstance(part.scale, torch.Tensor):
        values = values.float() * part.scale.view(-1, *[1] * (len(shape) - 1))
    elif part.scale != 1.0:
        values = values.float() * part.scale
    if part.transform is not None:
        values = part.transform(values.float())
    if part.accumulate:
        place += values.to(place)
    else:
        place.copy_(values)
    target.loaded.add(part.name)
