"""Random numbers as a function of (seed, purpose, sample): the same at every layout and on resume.

A sample is a position in the run, counted over all epochs as ``consumed_train_samples`` counts it.
Crop, flip and mask of a sample depend on nothing else, so there is no generator state to save.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Purpose(IntEnum):
    """What numbers are drawn for; each purpose has a stream of its own."""

    ORDER = 0
    AUGMENTATION = 1
    MASK = 2


def uniforms(seed: int, purpose: Purpose, samples: ArrayLike, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) of some samples.

    Args:
        seed: of the run.
        purpose: which stream.
        samples: [b], positions in the run; for ``Purpose.ORDER`` the number of an epoch.
        count: numbers of each.

    Returns:
        [b, count]. Philox's raw output is stable across versions of numpy, permutations are not.
    """
    numbers = np.atleast_1d(np.asarray(samples, dtype=np.uint64))
    raw = np.empty((len(numbers), count), dtype=np.uint64)
    key = np.array([seed, int(purpose)], dtype=np.uint64)
    for row, number in zip(raw, numbers):
        # The lowest of the four words counts the draws themselves.
        counter = np.array([0, number, 0, 0], dtype=np.uint64)
        row[:] = np.random.Philox(counter=counter, key=key).random_raw(count)
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, dtype=np.float64)
