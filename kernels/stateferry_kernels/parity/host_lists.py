"""Tensors of lengths and indices as Python integers, for plans that are made on the host."""

from __future__ import annotations

import torch

_INTEGERS = (torch.int32, torch.int64)


def host_list(name: str, tensor: torch.Tensor) -> list[int]:
    """The elements in order. Waits for the device when the tensor is not on the CPU. Raises
    TypeError unless they are int32 or int64."""
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: {tensor.dtype}, expected {' or '.join(map(str, _INTEGERS))}")
    numbers: list[int] = tensor.flatten().tolist()
    return numbers


def packed_offsets(name: str, tensor: torch.Tensor, total_tokens: int) -> list[int]:
    """(num_seqs + 1,) offsets of packed sequences. Raises ValueError unless they ascend from 0 to
    total_tokens."""
    if tensor.dim() != 1 or not len(tensor):
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected (num_seqs + 1,)")
    offsets = host_list(name, tensor)
    if offsets[0] or offsets[-1] != total_tokens or offsets != sorted(offsets):
        raise ValueError(f"{name}: {offsets} does not ascend from 0 to {total_tokens}")
    return offsets
