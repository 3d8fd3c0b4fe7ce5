"""How pixels become numbers around zero."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scaling:
    """``(value - mean) / std`` of red, green and blue in [0, 1].

    A channel's own mean and deviation, as ImageNet's, give grey pixels a colour, which does no harm
    to photographs; grey images want three equal ones.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def apply(self, images: Tensor) -> Tensor:
        """[..., 3, h, w] in [0, 1] -> normalised."""
        mean, std = self._columns(images)
        return (images - mean) / std

    def undo(self, images: Tensor) -> Tensor:
        """[..., 3, h, w] normalised -> in [0, 1], as far as they are images."""
        mean, std = self._columns(images)
        return images * std + mean

    def _columns(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device).view(3, 1, 1)
            for values in (self.mean, self.std)
        )
        return mean, std


IMAGENET = Scaling((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def scaling_from_args(args: argparse.Namespace) -> Scaling:
    """What a run's ``--mae-pixel-mean`` and ``--mae-pixel-std`` say; ImageNet's by default."""
    mean, std = args.mae_pixel_mean, args.mae_pixel_std
    return Scaling((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
