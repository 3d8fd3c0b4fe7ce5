"""Blockwise casts of a part of a matrix, as ranks cast their parts of sharded FP8 parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.fake_gpu import formats


def _blocks(rows: int, columns: int, start: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Row and column of the blocks that elements of a flat matrix lie in."""
    places = torch.arange(start, start + count)
    return places // columns // size, places % columns // size


def partial_amax(
    value: Tensor, amax: Tensor, rows: int, columns: int, start: int, size: int
) -> None:
    """``tex.fp8_block_scaling_compute_partial_amax``: of the blocks that ``value`` meets."""
    row, column = _blocks(rows, columns, start, value.numel(), size)
    flat = torch.zeros(amax.numel())
    places = row * amax.shape[1] + column
    flat.scatter_reduce_(0, places, value.float().abs().flatten(), "amax")
    amax.copy_(flat.view(amax.shape))


def partial_cast(
    value: Tensor,
    out: Tensor,
    scale: Tensor,
    rows: int,
    columns: int,
    start: int,
    size: int,
    dtype: Any,
) -> None:
    """``tex.fp8_block_scaling_partial_cast``: a part of a matrix by its blocks' factors."""
    row, column = _blocks(rows, columns, start, value.numel(), size)
    form = formats.torch_type(dtype)
    most = torch.finfo(form).max
    scaled = (value.float().flatten() * scale[row, column]).clamp(-most, most)
    out.copy_(scaled.to(form).view(torch.uint8).view(out.shape))


KERNELS: dict[str, Callable[..., Any]] = {
    "fp8_block_scaling_compute_partial_amax": partial_amax,
    "fp8_block_scaling_partial_cast": partial_cast,
}
