"""What a masked autoencoder sees and what it makes of it, as one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moa_megatron.vision.patches import patchify, unpatchify
from moa_megatron.vision.scaling import IMAGENET, Scaling

COLUMNS = ("original", "masked", "reconstruction")
_GREY, _WHITE = 127, 255


def reconstruction_grid(
    images: Tensor,
    predictions: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    visible: Tensor,
    patch: int,
    gap: int = 2,
    scaling: Scaling = IMAGENET,
) -> NDArray[np.uint8]:
    """A row for each image: the original, what the encoder saw, and the reconstruction.

    Hidden patches are grey in the middle. On the right they show the prediction, moved and scaled
    by the patch's own mean and standard deviation; visible patches are shown as they are.

    Args:
        images: [b, 3, h, w], normalised by `scaling`.
        predictions: [b, L, p*p*3] of the model.
        mean, std: [b, L, 1], of `normalised_targets`.
        visible: [b, v] int64, the visible patches.
        patch: p.
        gap: white pixels between pictures.
        scaling: which has normalised the images.

    Returns:
        [b * h + (b - 1) * gap, 3 * w + 2 * gap, 3].
    """
    images, predictions, mean, std = (x.detach().double() for x in (images, predictions, mean, std))
    b, channels, h, w = images.shape
    grid = h // patch, w // patch
    patches = patchify(images, patch)
    hidden = torch.ones(patches.shape[:2], dtype=torch.bool, device=visible.device)
    hidden = hidden.scatter(1, visible, False).unsqueeze(-1)
    filled = torch.where(hidden, predictions * std + mean, patches)
    shown = [
        _pixels(images, scaling),
        _pixels(images, scaling),
        _pixels(unpatchify(filled, patch, *grid, channels), scaling),
    ]
    covered = unpatchify(hidden.expand_as(patches), patch, *grid, channels)
    shown[1][covered.permute(0, 2, 3, 1).cpu().numpy()] = _GREY
    canvas = np.full((b * (h + gap) - gap, 3 * (w + gap) - gap, 3), _WHITE, dtype=np.uint8)
    for column, pictures in enumerate(shown):
        for row, picture in enumerate(pictures):
            top, left = row * (h + gap), column * (w + gap)
            canvas[top : top + h, left : left + w] = picture
    return canvas


def write_picture(grid: NDArray[np.uint8], path: Path, title: str = "") -> None:
    """Writes a picture of `reconstruction_grid` as PNG, its columns named above it.

    Small images are enlarged by whole pixels, so that they stay as they are.
    """
    from matplotlib.figure import Figure

    height, width, _ = grid.shape
    scale = max(1, round(600 / width))
    dpi, head = 100, 48
    size = (width * scale / dpi, (height * scale + head) / dpi)
    figure = Figure(figsize=size, dpi=dpi)
    share = height * scale / (height * scale + head)
    axes = figure.add_axes((0.0, 0.0, 1.0, share))
    axes.imshow(grid, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for column, name in enumerate(COLUMNS):
        place = (column + 0.5) / len(COLUMNS)
        figure.text(place, share + 0.2 * (1 - share), name, ha="center", va="bottom")
    if title:
        figure.text(0.5, 1 - 0.1 * (1 - share), title, ha="center", va="top", parse_math=False)
    figure.savefig(path)


def _pixels(images: Tensor, scaling: Scaling) -> NDArray[np.uint8]:
    """Normalised [b, 3, h, w] -> [b, h, w, 3]."""
    values = scaling.undo(images.cpu()).mul(255).round().clamp(0, 255)
    pixels: NDArray[np.uint8] = values.permute(0, 2, 3, 1).to(torch.uint8).numpy()
    return pixels
