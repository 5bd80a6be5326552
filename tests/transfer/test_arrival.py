"""Checksums taken while a run arrives are those of its segments, however it is cut."""

from __future__ import annotations

import numpy as np
import pytest

from stateferry.core.errors import IntegrityError
from stateferry.transfer.arrival import ArrivalCheck
from stateferry.transfer.blocking import Bytes, copy_with_crc32c, crc32c
from stateferry.transfer.manifest import SegmentKind, SegmentSpec, segment_offsets

SIZES = (1, 64, 0, 200, 65)


def run_of(sizes: tuple[int, ...]) -> tuple[list[SegmentSpec], Bytes]:
    starts, end = segment_offsets(sizes)
    run = np.random.default_rng(1).integers(0, 256, end, dtype=np.uint8)
    specs = [
        SegmentSpec(SegmentKind.SSM_STATE, n, "uint8", (size,), size, crc32c(run[at : at + size]))
        for n, (at, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    return specs, run


@pytest.mark.parametrize("step", [1, 7, 64, 128, 1000])
def test_every_cut_gives_the_same_answer(step: int) -> None:
    specs, run = run_of(SIZES)
    starts, _ = segment_offsets(SIZES)
    inside = {at + n for at, size in zip(starts, SIZES, strict=True) for n in range(size)}
    for flipped in (None, *range(run.size)):
        changed = run.copy()
        if flipped is not None:
            changed[flipped] ^= 0x40
        check = ArrivalCheck(specs)
        for at in range(0, changed.size, step):
            check.advance(changed[at : at + step])
        if flipped in inside:
            with pytest.raises(IntegrityError, match="checksum mismatch"):
                check.conclude()
        else:
            check.conclude()


def test_a_run_that_is_too_short() -> None:
    specs, run = run_of(SIZES)
    check = ArrivalCheck(specs)
    check.advance(run[:-1])
    with pytest.raises(IntegrityError, match=f"{run.size - 1} of {run.size} bytes"):
        check.conclude()


def test_a_copy_and_its_checksum_over_many_slices() -> None:
    data = np.random.default_rng(2).integers(0, 256, (1 << 20) + 3, dtype=np.uint8)
    target = np.zeros_like(data)
    assert copy_with_crc32c([data[:5], data[5:700_000], data[700_000:]], target) == crc32c(data)
    assert np.array_equal(target, data)
