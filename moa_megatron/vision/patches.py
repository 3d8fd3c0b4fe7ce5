"""Images as sequences of patches, and the pixels that a masked autoencoder predicts.

Shapes: b images, c channels, h and w pixels, p the side of a patch, L = (h/p)(w/p) patches row by
row. A patch holds its p*p*c values pixel by pixel, row by row, channels last.
"""

from __future__ import annotations

from torch import Tensor

# Keeps patches of one colour finite (MAE, He et al. 2022, in its published code).
_VARIANCE_EPS = 1e-6


def patchify(images: Tensor, patch: int) -> Tensor:
    """[b, c, h, w] -> [b, L, p*p*c].

    Raises:
        ValueError: where h or w is no multiple of ``patch``.
    """
    b, c, h, w = images.shape
    if h % patch or w % patch:
        raise ValueError(f"images of {h} x {w} pixels do not divide into patches of {patch}")
    split = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid_h: int, grid_w: int, channels: int) -> Tensor:
    """[b, grid_h * grid_w, p*p*channels] -> [b, channels, grid_h * p, grid_w * p]."""
    split = patches.reshape(-1, grid_h, grid_w, patch, patch, channels)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, grid_h * patch, grid_w * patch)


def normalised_targets(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What MAE predicts: each patch with mean 0 and variance 1 over its own values.

    Args:
        patches: [b, L, p*p*c].

    Returns:
        Targets of the same shape, and the mean and standard deviation [b, L, 1] that undo it:
        ``patches = targets * std + mean``. The variance is the unbiased one, plus a small constant.
    """
    mean = patches.mean(dim=-1, keepdim=True)
    std = (patches.var(dim=-1, keepdim=True) + _VARIANCE_EPS).sqrt()
    return (patches - mean) / std, mean, std
