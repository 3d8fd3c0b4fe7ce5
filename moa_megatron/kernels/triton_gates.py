"""Gate logits of grouped experts in Triton: a grouped product whose output stays in float32.

torch's grouped product rounds its output to bfloat16 and wants rows of 16 bytes; gates have few
output columns and want exact sums. One program takes ``TOKENS`` rows of one expert; which rows, it
works out from the experts' token counts: nothing of the size of the batch comes from the host.

Shape suffixes: T tokens sorted by expert, N experts, d input width, n coefficients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa_megatron.kernels.triton_math import INTERPRETED

TOKENS, COLUMNS = 64, 64  # rows and input columns of one step; tl.dot takes 16 or more
# Sums over an expert's tokens are shared out among programs until there are about this many.
PROGRAMS = 512


def grouped_logits(x_Td: Tensor, weights_Nnd: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
    """Rows of expert i times the transpose of its gate vectors, summed in float32.

    Args:
        x_Td: tokens, those of the first expert first; float32, bfloat16 or float16.
        weights_Nnd: gate vectors of each expert, in the same dtype.
        tokens_per_expert: N counts, zeros included.

    Returns:
        Float32 logits [T, n]. Gradients are computed in float32, in an order that depends on the
        counts alone, and returned in the dtype of their input.

    Raises:
        ValueError: if the counts do not add up to T.
    """
    if sum(tokens_per_expert) != len(x_Td) or len(tokens_per_expert) != len(weights_Nnd):
        raise ValueError(
            f"tokens_per_expert={list(tokens_per_expert)} for {len(x_Td)} rows and "
            f"{len(weights_Nnd)} experts: one count for each expert, which add up to the rows"
        )
    counts = torch.tensor(tokens_per_expert, dtype=torch.int32)
    if x_Td.is_cuda:
        counts = counts.pin_memory().to(x_Td.device, non_blocking=True)
    logits: Tensor = _GroupedLogits.apply(x_Td.contiguous(), weights_Nnd.contiguous(), counts)
    return logits


class _GroupedLogits(torch.autograd.Function):
    """Keeps its arguments only."""

    @staticmethod
    def forward(ctx: Any, x_Td: Tensor, weights_Nnd: Tensor, counts_N: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_Td, weights_Nnd, counts_N)
        logits = x_Td.new_empty(len(x_Td), weights_Nnd.shape[1], dtype=torch.float32)
        _launch(gate_forward, _tiles(x_Td, counts_N), (x_Td, weights_Nnd, logits), counts_N)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Tn: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x_Td, weights_Nnd, counts_N = ctx.saved_tensors
        grad_Tn = grad_Tn.contiguous()
        grad_x = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_x = x_Td.new_empty(x_Td.shape)
            tiles = _tiles(x_Td, counts_N)
            _launch(gate_backward_input, tiles, (grad_x, weights_Nnd, grad_Tn), counts_N)
        if ctx.needs_input_grad[1]:
            experts, width = len(counts_N), x_Td.shape[1]
            blocks = triton.cdiv(width, COLUMNS)
            parts = max(1, min(PROGRAMS // (experts * blocks), triton.cdiv(len(x_Td), TOKENS)))
            partial = x_Td.new_empty(parts, *weights_Nnd.shape, dtype=torch.float32)
            grid = (experts, blocks, parts)
            _launch(gate_backward_weight, grid, (x_Td, partial, grad_Tn), counts_N)
            grad_weights = partial.sum(0).to(weights_Nnd.dtype)
        return grad_x, grad_weights, None


def _tiles(x_Td: Tensor, counts_N: Tensor) -> tuple[int]:
    """At most one tile of each expert is not full."""
    return (len(x_Td) // TOKENS + len(counts_N),)


def _launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor, Tensor, Tensor], counts_N: Tensor
) -> None:
    x_Td, _, rows_Tn = tensors
    fixed = compile_time(len(counts_N), x_Td.shape[1], rows_Tn.shape[1])
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(x_Td.device) if x_Td.is_cuda else contextlib.nullcontext():
        kernel[grid](*tensors, counts_N, **fixed)


def compile_time(experts: int, width: int, coefficients: int) -> dict[str, int]:
    """Constants of the three kernels."""
    return {
        "EXPERTS": experts,
        "WIDTH": width,
        "N": coefficients,
        "EXPERTS_P2": triton.next_power_of_2(experts),
        "N_P2": max(16, triton.next_power_of_2(coefficients)),
        "TOKENS": TOKENS,
        "COLUMNS": COLUMNS,
    }


@triton.jit
def rows_of_tile(counts, EXPERTS: tl.constexpr, EXPERTS_P2: tl.constexpr, TOKENS: tl.constexpr):
    """Expert and rows of this program: (expert, first row of the tile, rows left in the expert)."""
    program = tl.program_id(0)
    index = tl.arange(0, EXPERTS_P2)
    rows = tl.load(counts + index, mask=index < EXPERTS, other=0)
    tiles = (rows + (TOKENS - 1)) // TOKENS
    expert = tl.sum((tl.cumsum(tiles, 0) <= program).to(tl.int32), 0)
    before = index < expert
    tile = program - tl.sum(tl.where(before, tiles, 0), 0)
    first = tl.sum(tl.where(before, rows, 0), 0) + tile * TOKENS
    left = tl.sum(tl.where(index == expert, rows, 0), 0) - tile * TOKENS
    # Programs beyond the last tile read the last expert and write nothing.
    left = tl.where(expert < EXPERTS, left, 0)
    return tl.minimum(expert, EXPERTS - 1), first.to(tl.int64), left


@triton.jit
def product(a, b):
    """a @ b, summed in float32; float32 is not cut to TF32."""
    # The interpreter would multiply the bits of bfloat16 numbers.
    if INTERPRETED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        result = tl.dot(a, b, input_precision="ieee")
    return result


@triton.jit
def gate_forward(
    x,
    weights,
    logits,
    counts,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    EXPERTS_P2: tl.constexpr,
    N_P2: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """logits [T, n] = x [T, d] times the transpose of weights[expert] [n, d]."""
    expert, first, left = rows_of_tile(counts, EXPERTS, EXPERTS_P2, TOKENS)
    row, k, d = tl.arange(0, TOKENS), tl.arange(0, N_P2), tl.arange(0, COLUMNS)
    source = x + (first + row)[:, None] * WIDTH
    gate = weights + (expert * N + k)[None, :] * WIDTH
    total = tl.zeros([TOKENS, N_P2], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + d
        inside = (row < left)[:, None] & (column < WIDTH)[None, :]
        tokens = tl.load(source + column[None, :], mask=inside, other=0.0)
        inside = (column < WIDTH)[:, None] & (k < N)[None, :]
        vectors = tl.load(gate + column[:, None], mask=inside, other=0.0)
        total += product(tokens, vectors)
    at = logits + (first + row)[:, None] * N + k[None, :]
    tl.store(at, total, mask=(row < left)[:, None] & (k < N)[None, :])


@triton.jit
def gate_backward_input(
    grad_x,
    weights,
    grad,
    counts,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    EXPERTS_P2: tl.constexpr,
    N_P2: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad_x [T, d] = grad [T, n] times weights[expert] [n, d]."""
    expert, first, left = rows_of_tile(counts, EXPERTS, EXPERTS_P2, TOKENS)
    row, d = tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    slopes = grad + (first + row) * N
    gate = weights + expert * N * WIDTH
    target = grad_x + (first + row)[:, None] * WIDTH
    for start in range(0, WIDTH, COLUMNS):
        column = start + d
        out = tl.zeros([TOKENS, COLUMNS], tl.float32)
        # No tl.dot: it would take TF32 for one float32 operand on Blackwell, "ieee" or not.
        for k in tl.static_range(N):
            slope = tl.load(slopes + k, mask=row < left, other=0.0)
            vector = tl.load(gate + k * WIDTH + column, mask=column < WIDTH, other=0.0)
            out += slope[:, None] * vector.to(tl.float32)[None, :]
        inside = (row < left)[:, None] & (column < WIDTH)[None, :]
        tl.store(target + column[None, :], out.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward_weight(
    x,
    partial,
    grad,
    counts,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    EXPERTS_P2: tl.constexpr,
    N_P2: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial[part, expert] [n, d] = the transpose of grad [., n] times x [., d], on every
    ``parts``-th tile of the expert's rows."""
    expert, part, parts = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    index = tl.arange(0, EXPERTS_P2)
    rows = tl.load(counts + index, mask=index < EXPERTS, other=0)
    first = tl.sum(tl.where(index < expert, rows, 0), 0).to(tl.int64)
    count = tl.sum(tl.where(index == expert, rows, 0), 0)
    row, k = tl.arange(0, TOKENS), tl.arange(0, N_P2)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.zeros([N_P2, COLUMNS], tl.float32)
    start = part * TOKENS
    while start < count:  # the interpreter's range takes no bounds that kernels compute
        here = start + row
        at = grad + (first + here)[None, :] * N + k[:, None]
        slopes = tl.load(at, mask=(here < count)[None, :] & (k < N)[:, None], other=0.0)
        source = x + (first + here)[:, None] * WIDTH + column
        tokens = tl.load(source, mask=(here < count)[:, None] & (column < WIDTH), other=0.0)
        total += product(slopes, tokens.to(tl.float32))
        start += parts * TOKENS
    place = part.to(tl.int64) * EXPERTS + expert
    target = partial + (place * N + k)[:, None] * WIDTH + column
    tl.store(target, total, mask=(k < N)[:, None] & (column < WIDTH))
