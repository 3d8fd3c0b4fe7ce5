"""Which patches of an image the encoder sees."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from moa_megatron.vision.randomness import Purpose, uniforms


def visible_count(patches: int, mask_ratio: float) -> int:
    """Patches that stay visible, of an image's; 49 of 196 at a ratio of 0.75."""
    return int(patches * (1 - mask_ratio))


def visible_patches(seed: int, samples: ArrayLike, patches: int, mask_ratio: float) -> Tensor:
    """A uniform choice of patches for each sample, a function of seed and position in the run.

    Args:
        seed: of the run.
        samples: [b], positions in the run.
        patches: L, patches of an image.
        mask_ratio: share of them that is hidden.

    Returns:
        int64 [b, visible]: indices of visible patches, ascending. Their order means nothing to the
        encoder, which knows positions by their embeddings.
    """
    noise = uniforms(seed, Purpose.MASK, samples, patches)
    chosen = np.argsort(noise, axis=1, kind="stable")[:, : visible_count(patches, mask_ratio)]
    return torch.from_numpy(np.sort(chosen, axis=1))
