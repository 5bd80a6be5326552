"""What this machine gives to an operation that does nothing else: the measure of ours."""

from __future__ import annotations

import torch

from bench.kernels.measure import Local, interleave
from bench.kernels.rows import Row, rows_of
from bench.kernels.workload import Workload

STREAM = "in-place stream"


def matmul_name(size: int) -> str:
    return f"torch matmul {size}"


def stream(size_bytes: int) -> Local:
    """Reads and writes a buffer of this size in place, as an update of states must."""
    buffer = torch.ones(size_bytes // 4)
    return Local(lambda _: buffer.mul_(1.0))


def matmul(size: int) -> Local:
    """2 size^3 FLOP, fp32."""
    a, b, out = (torch.ones(size, size) for _ in range(3))
    return Local(lambda _: torch.mm(a, b, out=out))


def matmul_flops(size: int) -> float:
    return 2.0 * size**3


def measure_ceilings(workload: Workload) -> tuple[list[Row], int]:
    """The rows, and the matmul size with the best rate. Copies and streams are of main memory."""
    size_bytes = min(256 << 20, workload.pool_bytes)
    source = torch.ones(size_bytes // 4)
    target = torch.ones_like(source)
    memory = interleave(
        {STREAM: stream(size_bytes), "copy": Local(lambda _: target.copy_(source))},
        workload.rounds,
        workload.sample_s,
        workload.group_s,
    )
    case = f"{size_bytes >> 20} MiB"
    rows = rows_of("ceiling", case, "fp32", memory, 2e-9 * size_bytes, "GB/s", STREAM)

    sizes = {matmul_name(size): size for size in workload.matmul_sizes}
    contenders = {name: matmul(size) for name, size in sizes.items()}
    times = interleave(contenders, workload.rounds, workload.sample_s, workload.group_s)
    work = {name: 1e-9 * matmul_flops(size) for name, size in sizes.items()}
    rows += rows_of("ceiling", "square", "fp32", times, work, "GFLOP/s", next(iter(sizes)))
    best = max(sizes, key=lambda name: work[name] / times.median(name))
    # A size has no speed-up over another.
    return [_bare(row) for row in rows], sizes[best]


def _bare(row: Row) -> Row:
    return Row(**{**vars(row), "speedup": None})
