"""Which image is read at which position of a run: a permutation of the whole data set an epoch."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moa_megatron.vision.randomness import Purpose, uniforms


def image_ids(seed: int, samples: ArrayLike, count: int) -> NDArray[np.int64]:
    """Rows of the index.

    Args:
        seed: of the run.
        samples: [b], positions in the run, counted over all epochs.
        count: images of the index. Every epoch has each of them once; none is dropped at its end,
            so a batch may hold the end of one epoch and the start of the next.

    Returns:
        [b]
    """
    epochs, places = np.divmod(np.atleast_1d(np.asarray(samples, dtype=np.int64)), count)
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _permutation(seed, int(epoch), count)[places[here]]
    return rows


@functools.lru_cache(maxsize=2)  # a batch at the turn of an epoch needs two
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.argsort(uniforms(seed, Purpose.ORDER, epoch, count)[0], kind="stable")
