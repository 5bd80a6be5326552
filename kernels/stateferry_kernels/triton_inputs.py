"""What Triton kernels take: products' dtype, and rows whose heads lie together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements from row to row of a batch: an interval's rows then span less than 2**31.
_LARGEST_STRIDE = 2**23


def dot_dtype(activation: torch.dtype) -> tl.dtype:
    """What products take: the activations' own dtype, but Triton's interpreter takes bf16 for
    integers."""
    if activation == torch.float32 or triton.knobs.runtime.interpret:
        return tl.float32
    return tl.bfloat16


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether all dimensions but the first are contiguous, and the first no stride too far."""
    if tensor.stride(0) > _LARGEST_STRIDE:
        return False
    expected = 1
    for size, stride in zip(tensor.shape[:0:-1], tensor.stride()[:0:-1], strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """The same rows, copied if ``is_packed`` does not hold."""
    return tensor if is_packed(tensor) else tensor.contiguous()
