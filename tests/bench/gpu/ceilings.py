"""What this card gives: bytes and products per second, measured in the same run."""

from __future__ import annotations

import torch

from bench.gpu.timing import repeated, times_us


def ceilings() -> dict[str, float]:
    """copy_tbs and update_tbs: TB/s of a copy and of an update in place, counting bytes read and
    written; matmul_tflops: of a bf16 product."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    size = 2 * source.nbytes
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    us = times_us(
        {
            "copy": repeated(lambda: target.copy_(source), 4),
            "update": repeated(lambda: source.mul_(1.0001), 4),
            "matmul": repeated(lambda: left @ left, 2),
        }
    )
    return {
        "copy_tbs": size / us["copy"] / 1e6,
        "update_tbs": size / us["update"] / 1e6,
        "matmul_tflops": 2 * 8192**3 / us["matmul"] / 1e6,
    }
