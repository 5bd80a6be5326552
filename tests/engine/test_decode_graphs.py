"""Which steps are captured, and in graphs of which sizes. The graphs themselves are in
test_gpu_engine.py."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from stateferry.config import WorkerSection
from stateferry.core.errors import ConfigError
from stateferry.engine.decode_graphs import _size_for, _sizes
from stateferry.worker.device import wants_graphs
from stateferry_kernels.dispatch import select_kernels

CUDA = torch.device("cuda")


def test_a_gpu_with_triton_has_graphs_unless_they_are_off() -> None:
    triton, other = select_kernels("triton"), select_kernels("torch")
    assert wants_graphs(WorkerSection(), CUDA, triton)
    assert not wants_graphs(WorkerSection(decode_graphs="off"), CUDA, triton)
    assert not wants_graphs(WorkerSection(), CUDA, other)
    assert not wants_graphs(WorkerSection(), torch.device("cpu"), triton)
    with pytest.raises(ConfigError, match="'on' is none of auto, off"):
        wants_graphs(WorkerSection(decode_graphs="on"), CUDA, triton)


def test_sizes() -> None:
    assert [_size_for(rows) for rows in (1, 2, 3, 33, 64, 65, 128, 129)] == [
        *(1, 2, 4, 64, 64),
        *(128, 128, 192),
    ]
    assert _sizes(1) == [1]
    assert _sizes(5) == [1, 2, 4, 8]
    assert _sizes(130) == [1, 2, 4, 8, 16, 32, 64, 128, 192]
