"""One line of the table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.kernels.measure import Times

OURS = "stateferry"


@dataclass(frozen=True)
class Row:
    """A contender at one size. ``rate`` is of its median; ``seconds`` is None if it is not here."""

    operation: str
    case: str
    dtype: str
    contender: str
    seconds: float | None
    best_seconds: float | None
    rate: float | None
    unit: str
    # How many times as fast ours is: the median of the rounds' ratios.
    speedup: float | None


def rows_of(
    operation: str,
    case: str,
    dtype: str,
    times: Times,
    work: dict[str, float] | float,
    unit: str,
    ours: str = OURS,
) -> list[Row]:
    """One row per contender; ``work`` is what one call does, in the unit times seconds."""
    rows = []
    for name in times.seconds:
        amount = work if isinstance(work, float) else work[name]
        median = times.median(name)
        speedup = None if name == ours else times.speedup(ours, name)
        rows.append(
            Row(
                operation,
                case,
                dtype,
                name,
                median,
                times.best(name),
                amount / median,
                unit,
                speedup,
            )
        )
    return rows


def absent(operation: str, case: str, dtype: str, contender: str) -> Row:
    """A contender that is not installed."""
    return Row(operation, case, dtype, contender, None, None, None, "", None)


def name_of(*dtypes: torch.dtype) -> str:
    """The activations' dtype, and the states' when it is another: ``bf16, fp32 states``."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    first, *others = (short[dtype] for dtype in dtypes)
    return first if not others or others[0] == first == "fp32" else f"{first}, {others[0]} states"
