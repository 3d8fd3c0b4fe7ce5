"""Which window of an image is shown, and whether mirrored: functions of (seed, sample) alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moa_megatron.vision.randomness import Purpose, uniforms

_ATTEMPTS = 10
# Of the numbers of a sample the first is the flip's, then two an attempt, then two for the place.
_FIRST, _PLACE = 1, 1 + 2 * _ATTEMPTS


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop and horizontal flip; the defaults are those of MAE's pretraining.

    Args:
        scale: range of the window's area, as a fraction of the image's.
        ratio: range of the window's width over its height.
        flip: probability of mirroring.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5


def crop_windows(
    seed: int,
    samples: ArrayLike,
    heights: ArrayLike,
    widths: ArrayLike,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> NDArray[np.int32]:
    """Windows of the random resized crop of "Going deeper with convolutions" (arXiv 1409.4842).

    Area and logarithm of the ratio are uniform; of ten attempts the first that fits is taken, at a
    uniform place, else the largest centred window whose ratio is in range.

    Args:
        samples: [b], positions in the run.
        heights, widths: [b], of the images.
        scale, ratio: as in `Augmentation`.

    Returns:
        [b, 4]: top, left, height, width.
    """
    height, width = (np.asarray(sides, dtype=np.int64) for sides in (heights, widths))
    numbers = uniforms(seed, Purpose.AUGMENTATION, samples, _PLACE + 2)
    areas, ratios = np.moveaxis(numbers[:, _FIRST:_PLACE].reshape(-1, _ATTEMPTS, 2), 2, 0)
    areas = (scale[0] + areas * (scale[1] - scale[0])) * (height * width)[:, None]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = np.exp(low + ratios * (high - low))
    tall = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    wide = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    fits = (tall > 0) & (wide > 0) & (tall <= height[:, None]) & (wide <= width[:, None])
    first, rows = fits.argmax(axis=1), np.arange(len(fits))
    size = np.stack([tall[rows, first], wide[rows, first]], axis=1)
    sides = np.stack([height, width], axis=1)
    # rand * (n + 1) is below n + 1 for rand < 1: every place is as likely.
    place = np.floor(numbers[:, _PLACE:] * (sides - size + 1)).astype(np.int64)
    found = np.concatenate([place, size], axis=1)
    shape = width / height
    centred = centre_windows(height, width, np.clip(shape, *ratio))
    return np.where(fits.any(axis=1)[:, None], found, centred).astype(np.int32)


def flips(seed: int, samples: ArrayLike, probability: float) -> NDArray[np.bool_]:
    """Which samples are mirrored, [b]."""
    return uniforms(seed, Purpose.AUGMENTATION, samples, 1)[:, 0] < probability


def centre_windows(
    heights: ArrayLike,
    widths: ArrayLike,
    ratio: float | NDArray[np.float64],
    crop_fraction: float = 1.0,
) -> NDArray[np.int32]:
    """The largest centred windows of some width over height.

    Args:
        heights, widths: [b], of the images.
        ratio: [b] or one for all.
        crop_fraction: of both sides of that window; 224/256 shows what resizing the short side
            to 256 and cropping 224 shows.

    Returns:
        [b, 4]: top, left, height, width.
    """
    height: NDArray[np.float64] = np.asarray(heights, dtype=np.float64)
    width: NDArray[np.float64] = np.asarray(widths, dtype=np.float64)
    tall = np.minimum(height, width / ratio) * crop_fraction
    wide = np.minimum(width, height * ratio) * crop_fraction
    size = np.maximum(1, np.rint(np.stack([tall, wide], axis=1)))
    place = (np.stack([height, width], axis=1) - size) // 2
    return np.concatenate([place, size], axis=1).astype(np.int32)
