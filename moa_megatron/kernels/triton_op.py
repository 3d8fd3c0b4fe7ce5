"""Launches the Triton kernels: layouts, tile choice, output tensors."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, overload

import torch
import triton
from torch import Tensor

from moa_megatron.config import MoAConfig
from moa_megatron.kernels import basis, triton_kernels
from moa_megatron.kernels.triton_math import INTERPRETED

# One warp per row, so that these differ in scheduling only: every choice gives the same bits.
CHOICES = [triton.Config({"ROWS": rows}, num_warps=rows) for rows in (1, 4)]
# Below two warps, sums need no shared memory: fewer instructions (tools/bench.py --static).
DEFAULT = {"mixture_forward": 4, "mixture_backward": 1}
TUNING_ROWS = 2048  # fewer rows than this say nothing about speed, and take the default
_KEY = ["PLAN", "FORM", "VEC"]


def unavailable(device: str) -> str | None:
    """Why these kernels cannot run on ``device``, with the fix, or None when they can."""
    if device == "cuda" or (device == "cpu" and INTERPRETED):
        return None
    return "it needs CUDA tensors (on a CPU: TRITON_INTERPRET=1, for tests)"


def tiling(width: int, itemsize: int, *strides_and_pointers: tuple[int, int]) -> dict[str, int]:
    """Form 0, with 16-byte loads, where D, row strides and addresses allow it; else form 1."""
    vector = 16 // itemsize
    aligned = width % vector == 0 and all(
        stride % vector == 0 and pointer % 16 == 0 for stride, pointer in strides_and_pointers
    )
    if aligned:
        return {"FORM": 0, "VEC": vector, "UNIT": vector}
    return {"FORM": 1, "VEC": 8, "UNIT": 1}


def forward(
    preact: Tensor, coefficients: Tensor, token_weight: Tensor | None, config: MoAConfig
) -> Tensor:
    """Hidden [N, D] from pre-activations [N, P], coefficients [N, n] or [n], token weights [N]."""
    coefficients, token_weight = _walkable(coefficients), _walkable(token_weight)
    rows, width = len(preact), preact.shape[1] // (1 + config.gated)
    hidden = preact.new_empty(rows, width)
    if hidden.numel() == 0:
        return hidden
    tile = tiling(width, preact.itemsize, _place(preact), _place(hidden))
    _launch(
        "mixture_forward",
        rows,
        (preact, coefficients, _or_any(token_weight, coefficients), hidden, rows),
        (*_in_units(tile, preact, hidden), _row_stride(coefficients)),
        _plan(config, width, preact, token_weight) | tile,
    )
    return hidden


def backward(
    grad: Tensor,
    preact: Tensor,
    coefficients: Tensor,
    token_weight: Tensor | None,
    config: MoAConfig,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of pre-activations, coefficients and token weights, each in its input's dtype."""
    coefficients, token_weight = _walkable(coefficients), _walkable(token_weight)
    rows, width = len(preact), preact.shape[1] // (1 + config.gated)
    learned = config.mixing == "la"
    grad_preact = preact.new_empty(preact.shape)
    grad_rows = coefficients.new_empty(
        rows, config.num_coefficients, dtype=torch.float32 if learned else coefficients.dtype
    )
    grad_weight = None if token_weight is None else token_weight.new_empty(token_weight.shape)
    if grad.numel():
        tile = tiling(width, preact.itemsize, _place(preact), _place(grad), _place(grad_preact))
        _launch(
            "mixture_backward",
            rows,
            (
                grad,
                preact,
                coefficients,
                _or_any(token_weight, coefficients),
                grad_preact,
                grad_rows,
                _or_any(grad_weight, grad_rows),
                rows,
            ),
            (*_in_units(tile, grad, preact, grad_preact), _row_stride(coefficients)),
            _plan(config, width, preact, token_weight) | tile,
        )
    else:
        grad_rows.zero_()
    if learned:
        return grad_preact, grad_rows.sum(dim=0).to(coefficients.dtype), grad_weight
    return grad_preact, grad_rows, grad_weight


def _plan(
    config: MoAConfig, width: int, preact: Tensor, token_weight: Tensor | None
) -> dict[str, Any]:
    exact = preact.dtype != torch.bfloat16
    return {"PLAN": basis.plan(config, width, exact, token_weight is not None)}


def _launch(
    name: str, rows: int, tensors: tuple[Any, ...], strides: tuple[int, ...], fixed: dict[str, Any]
) -> None:
    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, meta["ROWS"]),)

    first = tensors[0]
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        if INTERPRETED or rows < TUNING_ROWS:
            shape = {"ROWS": DEFAULT[name], "num_warps": DEFAULT[name]}
            getattr(triton_kernels, name)[grid](*tensors, *strides, **fixed, **shape)
        else:
            _tuned(name)[grid](*tensors, *strides, **fixed)


@functools.cache
def _tuned(name: str) -> Any:
    kernel = getattr(triton_kernels, name)
    return triton.autotune(CHOICES, key=_KEY, cache_results=True)(kernel)


@overload
def _walkable(tensor: Tensor) -> Tensor: ...
@overload
def _walkable(tensor: None) -> None: ...
def _walkable(tensor: Tensor | None) -> Tensor | None:
    """The same values, the last dimension without gaps; kernels take a stride between rows only."""
    if tensor is None or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.stride(0), tensor.data_ptr()


def _in_units(tile: dict[str, int], *tensors: Tensor) -> list[int]:
    return [tensor.stride(0) // tile["UNIT"] for tensor in tensors]


def _row_stride(coefficients: Tensor) -> int:
    return coefficients.stride(0) if coefficients.dim() == 2 else 0


def _or_any(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer the kernel does not follow."""
    return other if tensor is None else tensor
