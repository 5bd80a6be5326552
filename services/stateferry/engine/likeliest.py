"""The k largest of many numbers, without sorting them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GROUP = 128


def likeliest(values: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Places of the ``k`` largest of ``values`` (n,), ascending; of equals, the first ones."""
    if k >= values.shape[0]:
        return np.arange(values.shape[0])
    places = _candidates(values, k)
    kept = values[places]
    threshold = np.partition(kept, len(kept) - k)[len(kept) - k]
    larger = kept > threshold
    missing = k - int(np.count_nonzero(larger))
    larger[np.flatnonzero(kept == threshold)[:missing]] = True
    chosen: npt.NDArray[np.int64] = places[larger]
    return chosen


def _candidates(values: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """A few places that hold the k largest, most often little more than k.

    The k-th largest of the maxima of many groups is a lower bound: k groups reach it.
    """
    num_groups = values.shape[0] // _GROUP
    if k > num_groups // 2:
        return np.arange(values.shape[0])
    # A group is every num_groups-th number, so that maxima are taken of whole vectors.
    maxima = values[: num_groups * _GROUP].reshape(_GROUP, num_groups).max(axis=0)
    bound = np.partition(maxima, num_groups - k)[num_groups - k]
    return np.flatnonzero(values >= bound)
