"""Images with their classes, which judging an encoder needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from moa_megatron.recipes import RefusedError
from moa_megatron.vision.images import building
from moa_megatron.vision.images.loader import ImageLoader
from moa_megatron.vision.scaling import Scaling

_BATCH = 64
_BYTES = Scaling((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class LabelledImages:
    """Pixels [N, 3, h, w] in uint8 and a label for each, which counts ``classes``."""

    pixels: Tensor
    labels: NDArray[np.int64]
    classes: list[str]


def read_labelled(
    inputs: Sequence[Path],
    cache_dir: Path,
    size: tuple[int, int],
    *,
    crop_fraction: float = 1.0,
    limit: int | None = None,
    grey: bool = False,
    max_bad_fraction: float = 0.01,
    seed: int = 0,
    description: str = "images",
) -> LabelledImages:
    """Reads images as a run's evaluation does, in random order, in 8 bits, as files have them.

    Args:
        inputs: folders of classes, .tar or TFRecord files, as ``--train-data-path`` takes them.
        cache_dir: of the index.
        size: height and width of what the encoder reads.
        crop_fraction: share of the centred window that is kept.
        limit: at most so many images, drawn at random; None: all.
        grey: take grey images, too.
        max_bad_fraction: share of images that may be left out because they are damaged.
        seed: of the order.
        description: in front of the progress bar.

    Raises:
        RefusedError: inputs without images, with too many bad ones, or without classes.
    """
    index = building.build(inputs, cache_dir, grey=grey, max_bad_fraction=max_bad_fraction)
    count = len(index) if limit is None else min(limit, len(index))
    loader = ImageLoader(
        index,
        seed=seed,
        size=size,
        micro_batch=_BATCH,
        rank=0,
        ranks=1,
        start=0,
        period=None,
        augment=None,
        threads=len(os.sched_getaffinity(0)),
        device="cuda" if torch.cuda.is_available() else "cpu",
        crop_fraction=crop_fraction,
        scaling=_BYTES,
    )
    pixels, labels = [], []
    try:
        for _ in tqdm(range(-(-count // _BATCH)), desc=description, unit="batch", disable=None):
            batch = next(loader)
            pixels.append((batch["images"] * 255).round().clamp(0, 255).to(torch.uint8).cpu())
            labels.append(batch["labels"].numpy())
    finally:
        loader.close()
    # The last batch may go on into the next epoch.
    numbers, places = np.unique(np.concatenate(labels)[:count], return_inverse=True)
    named = index.class_names
    classes = [named[number] if named else str(number) for number in numbers]
    if len(classes) < 2 or numbers[0] < 0 or "" in classes:
        raise RefusedError(
            f"{', '.join(map(str, inputs))}: not every image has one of several classes; give "
            "folders with a sub-folder for each class, or shards with labels, by "
            "--train-data-path and --valid-data-path"
        )
    return LabelledImages(torch.cat(pixels)[:count], places.astype(np.int64), classes)
