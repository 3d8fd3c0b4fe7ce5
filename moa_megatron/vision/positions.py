"""Fixed two-dimensional position embeddings of image patches."""

from __future__ import annotations

import torch
from torch import Tensor

_TEMPERATURE = 10000.0


def sincos_positions(grid_h: int, grid_w: int, width: int) -> Tensor:
    """Sine-cosine position embeddings of a grid of patches, row by row.

    The first half of the channels encodes the patch's row, the second its column; each half holds
    the sines of all frequencies, then their cosines. Source: MAE (He et al. 2022), appendix A.1.

    Args:
        grid_h: rows of patches.
        grid_w: columns of patches.
        width: channels, a multiple of four.

    Returns:
        [grid_h * grid_w, width] in float32, computed in float64.

    Raises:
        ValueError: for another width.
    """
    if width % 4:
        raise ValueError(
            f"width={width}: position embeddings of two axes need a multiple of 4, such as "
            f"{width + 4 - width % 4}"
        )
    quarter = width // 4
    frequencies = _TEMPERATURE ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (
        torch.outer(torch.arange(size, dtype=torch.float64), frequencies)
        for size in (grid_h, grid_w)
    )
    by_row, by_column = (torch.cat([a.sin(), a.cos()], dim=1) for a in (rows, columns))
    positions = torch.cat([by_row.repeat_interleave(grid_w, 0), by_column.repeat(grid_h, 1)], dim=1)
    return positions.to(torch.float32)
