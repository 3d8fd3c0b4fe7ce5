"""Transformer Engine's FP8 formats: casts in plain PyTorch, into its own tensor classes.

Scales as its kernels choose them: given (delayed), by the tensor's largest value (tensorwise), by
that of 128 values or 128 x 128 (blockwise). The dequantisation is Transformer Engine's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.fake_gpu import mxfp8


def torch_type(dtype: Any) -> Any:
    """The torch.dtype of an element type of Transformer Engine's; None of None."""
    from transformer_engine.pytorch.constants import DType, TE_DType_To_Torch

    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    return TE_DType_To_Torch[DType.cast(dtype)]


def quantised() -> tuple[type, ...]:
    """Classes of the tensors that are emulated."""
    from transformer_engine.pytorch.tensor.storage import float8_blockwise_tensor_storage as blocks
    from transformer_engine.pytorch.tensor.storage import float8_tensor_storage as whole
    from transformer_engine.pytorch.tensor.storage import mxfp8_tensor_storage as micro

    return (
        whole.Float8TensorStorage,
        blocks.Float8BlockwiseQTensorStorage,
        micro.MXFP8TensorStorage,
    )


def operand(value: Any, along_rows: bool) -> Tensor:
    """A product's factor in float32, from the copy that a GPU reads.

    Args:
        along_rows: whether the product sums over the last dimension.
    """
    whole, blocks, micro = quantised()
    if not isinstance(value, quantised()):
        return value.float()  # type: ignore[no-any-return]
    if isinstance(value, micro):
        return mxfp8.operand(value, along_rows, torch_type(value._fp8_dtype))
    if isinstance(value, whole):
        if along_rows or _reads_both_ways():
            assert value._data is not None, "an FP8 product without the rows' copy"
            return _values(value._data, value) * value._scale_inv
        usable = value._transpose is not None and not value._transpose_invalid
        assert usable, "an FP8 product without the columns' copy"
        return (_values(value._transpose, value) * value._scale_inv).movedim(0, -1)
    metadata = dict(value.get_metadata())
    kept, left = ("rowwise", "columnwise") if along_rows else ("columnwise", "rowwise")
    assert metadata[f"{kept}_data"] is not None, f"an FP8 product without {kept} data"
    metadata |= {f"{left}_data": None, f"{left}_scale_inv": None}
    return blocks(**metadata).dequantize(dtype=torch.float32)  # type: ignore[no-any-return]


def check_factors(a: Any, b: Any, *values: Tensor) -> None:
    """What cuBLAS asks of the factors of an FP8 product, whose ``values`` are the operands."""
    kinds = [[k for k in quantised() if isinstance(value, k)] for value in (a, b)]
    if not any(kinds):
        return
    assert kinds[0] == kinds[1], f"factors of two formats: {type(a).__name__}, {type(b).__name__}"
    forms = {torch_type(value._fp8_dtype) for value in (a, b)}
    assert forms != {torch.float8_e5m2}, "both factors have e5m2"
    squares = [getattr(value, "_is_2D_scaled", False) for value in (a, b)]
    assert not all(squares), "both factors have scales of squares"
    multiple = mxfp8.SIZE if kinds[0] == [quantised()[2]] else 16
    for value in values:
        rows, columns = math.prod(value.shape[:-1]), value.shape[-1]
        assert rows % multiple == columns % multiple == 0, f"{rows} x {columns} in FP8"


def _reads_both_ways() -> bool:
    from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

    return bool(is_non_tn_fp8_gemm_supported())  # from Blackwell on


def _values(data: Tensor, owner: Any) -> Tensor:
    return data.view(torch_type(owner._fp8_dtype)).float()


def create(quantizer: Any, shape: Sequence[int], dtype: torch.dtype, *rest: Any) -> Any:
    """``tex.create_empty_quantized_tensor``: uninitialised, with the copies in use."""
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor as blocks
    from transformer_engine.pytorch.tensor import float8_tensor as whole

    shape = [int(size) for size in shape]
    if mxfp8.is_quantiser(quantizer):
        return mxfp8.create(quantizer, shape, dtype)
    columns = [shape[-1], *shape[:-1]]
    rowwise, columnwise = quantizer.rowwise_usage, quantizer.columnwise_usage
    data = torch.empty(shape, dtype=torch.uint8) if rowwise else None
    transposed = torch.empty(columns, dtype=torch.uint8) if columnwise else None
    words: dict[str, Any] = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if isinstance(quantizer, blocks.Float8BlockQuantizer):
        scales = [
            torch.zeros(quantizer.get_scale_shape(shape, flag)) if used else None
            for flag, used in ((False, rowwise), (True, columnwise))
        ]
        words |= {"rowwise_data": data, "columnwise_data": transposed}
        words |= {"rowwise_scale_inv": scales[0], "columnwise_scale_inv": scales[1]}
        words |= {"is_2D_scaled": quantizer.block_scaling_dim == 2}
        kinds = (blocks.Float8BlockwiseQTensorStorage, blocks.Float8BlockwiseQTensor)
    else:
        known = (whole.Float8Quantizer, whole.Float8CurrentScalingQuantizer)
        assert isinstance(quantizer, known), f"not emulated: {type(quantizer).__name__}"
        if _reads_both_ways():
            data, transposed = torch.empty(shape, dtype=torch.uint8), None
        words |= {"data": data, "data_transpose": transposed, "fp8_scale_inv": torch.ones(1)}
        kinds = (whole.Float8TensorStorage, whole.Float8Tensor)
    if quantizer.internal:
        return kinds[0](**words, fake_dtype=dtype)
    return kinds[1](shape=shape, dtype=dtype, device=torch.device("cpu"), **words)


def quantize(value: Tensor, quantizer: Any, out: Any = None, noop: Tensor | None = None) -> Any:
    """``tex.quantize``: into ``out`` or a new tensor; nothing where ``noop`` holds 1."""
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor as blocks

    value = value.detach()
    if isinstance(value, quantised()):
        value = value.dequantize()
    made = create(quantizer, value.shape, value.dtype)
    made = made if out is None else _with_copies(out, made)
    if noop is not None and noop.numel() and bool(noop.item()):
        return made
    if mxfp8.is_quantiser(quantizer):
        mxfp8.fill(made, value, torch_type(quantizer.dtype))
    elif isinstance(quantizer, blocks.Float8BlockQuantizer):
        _fill_blocks(made, value, quantizer)
    else:
        _fill_whole(made, value, quantizer)
    return made


_COPIES = ("_data", "_transpose", "_rowwise_data", "_columnwise_data")
_COPIES += ("_rowwise_scale_inv", "_columnwise_scale_inv")


def _with_copies(out: Any, fresh: Any) -> Any:
    """``out`` with the copies that its quantiser makes now, and no others."""
    for name in _COPIES:
        if getattr(fresh, name, None) is None and getattr(out, name, None) is not None:
            setattr(out, name, None)
        elif getattr(fresh, name, None) is not None and getattr(out, name, None) is None:
            setattr(out, name, getattr(fresh, name))
    if hasattr(out, "_transpose"):
        out._transpose_invalid = out._transpose is None
    return out


def _most(quantizer: Any) -> float:
    return float(torch.finfo(torch_type(quantizer.dtype)).max)


def _bytes(value: Tensor, quantizer: Any) -> Tensor:
    """Rounded to the nearest; beyond the largest number, that."""
    most = _most(quantizer)
    return value.clamp(-most, most).to(torch_type(quantizer.dtype)).view(torch.uint8)


def _scale(amax: Tensor, most: float, powers: bool, epsilon: float) -> Tensor:
    """The factor that makes a largest value the format's largest: 1 for nothing or infinity."""
    amax = amax.clamp(min=epsilon)
    scale = most / amax
    scale = torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    return (scale.frexp().exponent - 1.0).exp2() if powers else scale


def _own_scale(amax: Tensor, quantizer: Any) -> Tensor:
    return _scale(amax, _most(quantizer), quantizer.force_pow_2_scales, quantizer.amax_epsilon)


def _fill_whole(made: Any, value: Tensor, quantizer: Any) -> None:
    value = value.float()
    amax = value.abs().amax().reshape(1) if value.numel() else torch.zeros(1)
    if hasattr(quantizer, "scale"):
        if quantizer.amax.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.view(quantizer.amax.shape)))
        scale = quantizer.scale.reshape(1).clone()
    else:
        if quantizer.with_amax_reduction:
            group = quantizer.amax_reduction_group
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=group)
        scale = _own_scale(amax, quantizer)
    made._scale_inv.copy_((1 / scale).view(made._scale_inv.shape))
    data = _bytes(value * scale, quantizer)
    if made._data is not None:
        made._data.copy_(data.view(made._data.shape))
    if made._transpose is not None:
        made._transpose.copy_(transpose(data).view(made._transpose.shape))
        made._transpose_invalid = False


def _fill_blocks(made: Any, value: Tensor, quantizer: Any) -> None:
    value = value.float().flatten(0, -2)
    two = quantizer.block_scaling_dim == 2
    for matrix, data, scales in (
        (value, made._rowwise_data, made._rowwise_scale_inv),
        (value.T, made._columnwise_data, made._columnwise_scale_inv),
    ):
        if data is None or not value.numel():
            continue
        rows, columns = matrix.shape
        size = quantizer.block_len
        high = size if two else 1
        padded = torch.zeros(-(-rows // high) * high, -(-columns // size) * size)
        padded[:rows, :columns] = matrix
        tiles = padded.view(-1, high, padded.shape[1] // size, size)
        scale = _own_scale(tiles.abs().amax((1, 3), keepdim=True), quantizer)
        found = _bytes(tiles * scale, quantizer).view(padded.shape)[:rows, :columns]
        data.copy_(found.reshape(data.shape))
        inverse = 1 / scale[:, 0, :, 0]
        inverse = inverse if two else inverse.T
        scales[: inverse.shape[0], : inverse.shape[1]] = inverse


def transpose(data: Tensor, dtype: Any = None, *, out: Tensor | None = None) -> Tensor:
    """``tex.fp8_transpose``: the last dimension comes first."""
    moved = data.movedim(-1, 0).contiguous()
    return moved if out is None else out.copy_(moved.view(out.shape))


def split_quantize(
    value: Tensor, sizes: Sequence[int], quantizers: Sequence[Any], *rest: Any, **words: Any
) -> list[Any]:
    """``tex.split_quantize``: every part by its own quantiser."""
    parts = value.split([int(size) for size in sizes])
    return [quantize(part, each) for part, each in zip(parts, quantizers, strict=True)]


def bgrad_quantize(grad: Tensor, quantizer: Any) -> list[Any]:
    """``tex.bgrad_quantize``: the bias gradient, and the gradient in eight bits."""
    summed = grad.float().flatten(0, -2).sum(0).to(grad.dtype)
    return [summed, grad if quantizer is None else quantize(grad, quantizer)]


def _amax(value: Tensor, out: Tensor) -> None:
    out.copy_(value.abs().amax() if value.numel() else torch.zeros(()))


def scales(
    chunk: int, overflow: Tensor, lists: list[list[Tensor]], most: float, powers: bool, eps: float
) -> None:
    """``tex.multi_tensor_compute_scale_and_scale_inv``: from largest values, with inverses."""
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(_scale(amax, most, powers, eps))
        inverse.copy_(1 / scale)


def dequantize(value: Any, dtype: Any) -> Tensor:
    """``tex.dequantize``; most formats have it in Python."""
    if isinstance(value, quantised()[2]):
        return mxfp8.dequantize(value, torch_type(value._fp8_dtype)).to(torch_type(dtype))
    return value.dequantize(dtype=torch_type(dtype))  # type: ignore[no-any-return]


KERNELS: dict[str, Callable[..., Any]] = {
    "create_empty_quantized_tensor": create,
    "quantize": quantize,
    "dequantize": dequantize,
    "split_quantize": split_quantize,
    "bgrad_quantize": bgrad_quantize,
    "fp8_transpose": transpose,
    "compute_amax": _amax,
    "multi_tensor_compute_scale_and_scale_inv": scales,
}
