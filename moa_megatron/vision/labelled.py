"""Images with labels, which judging an encoder needs: folders of one sub-folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from moa_megatron.recipes import RefusedError
from moa_megatron.vision.scaling import IMAGENET, Scaling

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True)
class LabelledImages:
    """Pixels [N, 3, h, w] in uint8, a label for each, and what could not be read."""

    pixels: Tensor
    labels: NDArray[np.int64]
    classes: list[str]
    unreadable: list[Path]


def read_labelled(
    folders: Sequence[Path],
    size: tuple[int, int],
    crop_fraction: float = 1.0,
    limit: int | None = None,
    description: str = "images",
) -> LabelledImages:
    """Reads the images of classes, each cropped at its centre and scaled.

    Args:
        folders: with one sub-folder for each class.
        size: height and width of what the encoder reads.
        crop_fraction: share of the short side that the crop keeps.
        limit: at most so many images, about as many of each class; None: all.
        description: in front of the progress bar.

    Raises:
        RefusedError: a folder that is missing or has no classes with images in it.
    """
    by_class: dict[str, list[Path]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*/*")):
            if path.suffix.lower() in _SUFFIXES:
                by_class.setdefault(path.parent.name, []).append(path)
    if not by_class:
        raise RefusedError(
            f"{', '.join(map(str, folders))}: no images in sub-folders of classes; name folders "
            "such as ImageNet's train and val, with --train-data-path and --valid-data-path"
        )
    classes = sorted(by_class)
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in _spread(by_class[name], None if limit is None else -(-limit // len(classes)))
    ]
    pixels, labels, unreadable = [], [], []
    for path, label in tqdm(files, desc=description, unit="image", disable=None):
        try:
            with Image.open(path) as image:
                pixels.append(_centre(image.convert("RGB"), size, crop_fraction))
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
            unreadable.append(path)
            continue
        labels.append(label)
    if not pixels:
        raise RefusedError(f"{folders[0]}: none of {len(files)} images can be read")
    return LabelledImages(torch.stack(pixels), np.array(labels), classes, unreadable)


def normalised(pixels: Tensor, scaling: Scaling = IMAGENET) -> Tensor:
    """uint8 [b, 3, h, w] -> float32, as images are normalised for training."""
    return scaling.apply(pixels.float() / 255)


def _spread(files: list[Path], count: int | None) -> list[Path]:
    """`count` of the files at equal distances."""
    if count is None or count >= len(files):
        return files
    return [files[index * len(files) // count] for index in range(count)]


def _centre(image: Image.Image, size: tuple[int, int], fraction: float) -> Tensor:
    """The centre in the shape of `size`, as large as fits, times `fraction`."""
    h, w = size
    unit = fraction * min(image.height / h, image.width / w)
    height, width = max(1, round(unit * h)), max(1, round(unit * w))
    top, left = (image.height - height) // 2, (image.width - width) // 2
    part = image.crop((left, top, left + width, top + height))
    scaled = part.resize((w, h), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
