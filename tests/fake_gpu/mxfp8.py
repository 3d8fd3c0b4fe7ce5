"""MXFP8 of Blackwell GPUs: 32 neighbours share a power of two, along rows and along columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SIZE = 32
BIAS = 127  # of the exponents, which are all that a scale is (e8m0)


def is_quantiser(quantizer: Any) -> bool:
    """Whether a quantiser makes tensors of this format."""
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    return isinstance(quantizer, MXFP8Quantizer)


def create(quantizer: Any, shape: Sequence[int], dtype: torch.dtype) -> Any:
    """An uninitialised tensor with the copies in use; that of the columns is not transposed."""
    from transformer_engine.pytorch.tensor import mxfp8_tensor as tensors

    words: dict[str, Any] = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    for name, used, columns in (
        ("rowwise", quantizer.rowwise_usage, False),
        ("columnwise", quantizer.columnwise_usage, True),
    ):
        sizes = quantizer.get_scale_shape(shape, columns)
        words[f"{name}_data"] = torch.empty(shape, dtype=torch.uint8) if used else None
        words[f"{name}_scale_inv"] = torch.zeros(sizes, dtype=torch.uint8) if used else None
    words["with_gemm_swizzled_scales"] = False
    if quantizer.internal:
        return tensors.MXFP8TensorStorage(**words, fake_dtype=dtype)
    return tensors.MXFP8Tensor(shape=shape, dtype=dtype, device=torch.device("cpu"), **words)


def fill(made: Any, value: Tensor, form: torch.dtype) -> None:
    """Casts a value into the copies that ``made`` has."""
    matrix = value.float().flatten(0, -2)
    if made._rowwise_data is not None:
        data, scales = _cast(matrix, form)
        made._rowwise_data.copy_(data.view(made._rowwise_data.shape))
        made._rowwise_scale_inv[: scales.shape[0], : scales.shape[1]] = scales
    if made._columnwise_data is not None:
        data, scales = (part.T for part in _cast(matrix.T, form))
        made._columnwise_data.copy_(data.reshape(made._columnwise_data.shape))
        made._columnwise_scale_inv[: scales.shape[0], : scales.shape[1]] = scales


def _cast(matrix: Tensor, form: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bytes and exponents, by blocks along the rows; the scale is rounded up to a power of two."""
    most = torch.finfo(form).max
    blocks = matrix.reshape(len(matrix), matrix.shape[1] // SIZE, SIZE)
    mantissa, exponents = torch.frexp(blocks.abs().amax(-1) / most)
    exponents = (exponents.float() - (mantissa == 0.5).float()).clamp(-BIAS, BIAS)
    scaled = blocks * (-exponents).exp2().unsqueeze(-1)
    data = scaled.clamp(-most, most).to(form).view(torch.uint8).view(matrix.shape)
    return data, (exponents + BIAS).to(torch.uint8)


def operand(value: Any, along_rows: bool, form: torch.dtype) -> Tensor:
    """A product's factor in float32, from the copy that has scales along the summed dimension."""
    kind = "rowwise" if along_rows else "columnwise"
    data, scales = getattr(value, f"_{kind}_data"), getattr(value, f"_{kind}_scale_inv")
    assert data is not None, f"an FP8 product without {kind} data"
    matrix = data.view(form).float().flatten(0, -2)
    factors = (scales.float() - BIAS).exp2()
    factors = factors.repeat_interleave(SIZE, dim=1 if along_rows else 0)
    return (matrix * factors[: len(matrix), : matrix.shape[1]]).view(data.shape)


def dequantize(value: Any, form: torch.dtype) -> Tensor:
    """The value of either copy, in float32."""
    return operand(value, value._rowwise_data is not None, form)
