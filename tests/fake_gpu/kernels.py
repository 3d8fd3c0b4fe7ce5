"""Transformer Engine's GPU kernels in plain PyTorch, so that its modules run on a CPU.

All of its Python is its own: modules, autograd functions, quantisers, recipes and their state. What
it calls in ``transformer_engine_torch`` is replaced by the definition of the same function, with
the tensors' roles as on a GPU: Hopper's FP8 products take both operands along the summed dimension,
so they need the copies that modules have to have made. Not here: fused attention, user buffers,
grouped tensors in one buffer (Blackwell), NVFP4.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.fake_gpu import attention, formats, optimisers, parts


def install() -> None:
    """Replaces the kernels in every module of Transformer Engine that has them."""
    import transformer_engine.pytorch  # noqa: F401  (loads the extension)
    import transformer_engine_torch as tex

    unknown = KERNELS.keys() - vars(tex).keys()
    assert not unknown, f"kernels that Transformer Engine does not have: {unknown}"
    replaced = {
        id(function): torch.no_grad()(KERNELS.get(name) or _missing(name))
        for name, function in vars(tex).items()
        if callable(function) and not isinstance(function, type) and name != "get_cudnn_version"
    }
    modules = [tex, *(m for n, m in sys.modules.items() if n.startswith("transformer_engine."))]
    for module in modules:
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])


def _missing(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **words: Any) -> Any:
        raise NotImplementedError(f"tests/fake_gpu has no {name} of transformer_engine_torch")

    return kernel


def _product(a: Any, transpose_a: bool, b: Any, transpose_b: bool) -> Tensor:
    """op(B) op(A), summed in float32: cuBLAS counts columns first.

    A row of A^T and a row of B lie along the summed dimension; of A and B^T a column does.
    """
    left = formats.operand(b, along_rows=not transpose_b)
    right = formats.operand(a, along_rows=transpose_a)
    formats.check_factors(a, b, left, right)
    right = right.flatten(0, -2)
    if transpose_b:
        return left.flatten(0, -2).T @ (right.T if transpose_a else right)
    return left @ (right.T if transpose_a else right)


def generic_gemm(
    a: Any,
    transpose_a: bool,
    b: Any,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    *rest: Any,
    comm_overlap: Any = None,
    alpha: float = 1.0,
    beta: float | None = None,
    **others: Any,
) -> tuple[Any, Tensor | None, None, None]:
    """``tex.generic_gemm``: output, bias gradient, GELU's input, extra output."""
    assert comm_overlap is None and not gelu and alpha == 1.0, "not emulated"
    accumulate = rest[2]
    value = _product(a, transpose_a, b, transpose_b)
    if bias is not None and not grad:
        value = value + bias.float()
    summed = None
    if bias is not None and grad:
        summed = formats.operand(b, along_rows=not transpose_b).flatten(0, -2).sum(0)
        summed = summed.to(formats.torch_type(bias_type))
    if quantizer is not None:
        return quantizer(value), summed, None, None
    if out is None:
        fallback = a.dtype if isinstance(a, Tensor) else torch.bfloat16
        return value.to(formats.torch_type(dtype) or fallback), summed, None, None
    out.copy_(out + value if accumulate else value)
    return out, summed, None, None


def grouped_gemm(
    a: Sequence[Any],
    transpose_a: bool,
    b: Sequence[Any],
    transpose_b: bool,
    out: Sequence[Tensor],
    dtype: Any,
    splits: Sequence[int],
    bias: Sequence[Tensor],
    bias_type: Any,
    single_output: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    size: int,
    accumulate: bool,
    *rest: Any,
) -> list[Tensor]:
    """``tex.te_general_grouped_gemm``: one product after the other; fills ``out``."""
    targets = out[0].split(list(splits)) if single_output else out
    for index, (one, other, target) in enumerate(zip(a, b, targets, strict=True)):
        value = _product(one, transpose_a, other, transpose_b)
        if len(bias) and bias[index].numel():
            assert not grad, "not emulated"
            value = value + bias[index].float()
        target.copy_(target + value if accumulate else value)
    return list(bias)


def _normal(x: Tensor, mean: Tensor | None, scale: Tensor) -> Tensor:
    x = x.float().flatten(0, -2)
    return (x if mean is None else x - mean[:, None]) * scale[:, None]


def _finished(value: Tensor, x: Tensor, out: Any, quantizer: Any, dtype: Any) -> Any:
    value = value.view(x.shape).to(formats.torch_type(dtype))
    if out is not None and not isinstance(out, formats.quantised()):
        return out.copy_(value)
    if out is not None:
        return formats.quantize(value, quantizer, out)
    return value if quantizer is None else quantizer(value)


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    margin: int,
    zero_centered: bool,
) -> list[Any]:
    """``tex.layernorm_fwd``: output, mean, reciprocal standard deviation."""
    rows = x.float().flatten(0, -2)
    mean = rows.mean(-1)
    scale = (rows.var(-1, correction=0) + eps).rsqrt()
    value = _normal(x, mean, scale) * (weight.float() + zero_centered)
    value = value if bias is None else value + bias.float()
    return [_finished(value, x, out, quantizer, dtype), mean, scale]


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    margin: int,
    zero_centered: bool,
) -> list[Any]:
    """``tex.rmsnorm_fwd``: output, nothing, reciprocal root mean square."""
    scale = (x.float().flatten(0, -2).square().mean(-1) + eps).rsqrt()
    value = _normal(x, None, scale) * (weight.float() + zero_centered)
    return [_finished(value, x, out, quantizer, dtype), None, scale]


def _norm_bwd(
    grad: Tensor, x: Tensor, mean: Tensor | None, scale: Tensor, weight: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    normal = _normal(x, mean, scale)
    rows = grad.float().flatten(0, -2)
    inner = rows * (weight.float() + zero_centered)
    change = inner - normal * (inner * normal).mean(-1, keepdim=True)
    if mean is not None:
        change = change - inner.mean(-1, keepdim=True)
    dx = (change * scale[:, None]).view(x.shape).to(x.dtype)
    return dx, (rows * normal).sum(0).to(weight.dtype)


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> list[Tensor]:
    """``tex.rmsnorm_bwd``: gradients of input and weight."""
    return list(_norm_bwd(grad, x, None, scale, weight, zero_centered))


def rmsnorm_bwd_add(
    grad: Tensor,
    x: Tensor,
    added: Tensor,
    scale: Tensor,
    weight: Tensor,
    margin: int,
    zero_centered: bool,
) -> list[Tensor]:
    """``tex.rmsnorm_bwd_add``: the same, with another gradient of the input added."""
    dx, dw = _norm_bwd(grad, x, None, scale, weight, zero_centered)
    return [(dx.float() + added.float().view(dx.shape)).to(dx.dtype), dw]


def layernorm_bwd(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    margin: int,
    zero_centered: bool,
) -> list[Tensor]:
    """``tex.layernorm_bwd``: gradients of input, weight and bias."""
    dx, dw = _norm_bwd(grad, x, mean, scale, weight, zero_centered)
    return [dx, dw, grad.float().flatten(0, -2).sum(0).to(weight.dtype)]


def swap_first(value: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``tex.swap_first_dims``."""
    swapped = value.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)


def pad_rows(x: Tensor, out: Tensor, rows: Sequence[int], padded: Sequence[int]) -> None:
    """``tex.fused_multi_row_padding``: zeros behind every part."""
    for part, target in zip(x.split(list(rows)), out.split(list(padded)), strict=True):
        target[: len(part)] = part
        target[len(part) :] = 0


def unpad_rows(x: Tensor, out: Tensor, padded: Sequence[int], rows: Sequence[int]) -> None:
    """``tex.fused_multi_row_unpadding``: without what was put behind the parts."""
    for part, target in zip(x.split(list(padded)), out.split(list(rows)), strict=True):
        target.copy_(part[: len(target)])


def update_scales(
    amax: Tensor,
    histories: Sequence[Tensor],
    scales: Sequence[Tensor],
    algorithm: str,
    dtype: Any,
    margin: float,
) -> None:
    """``tex.fused_amax_and_scale_update_after_reduction``: delayed scaling's step."""
    most = torch.finfo(formats.torch_type(dtype)).max
    parts = amax.split([scale.numel() for scale in scales])
    for part, history, scale in zip(parts, histories, scales, strict=True):
        history[0] = part
        largest = history.amax(0) if algorithm == "max" else history[0].clone()
        fresh = most / largest / 2**margin
        usable = (largest > 0) & largest.isfinite()
        fresh = torch.where(usable, fresh, scale)
        scale.copy_(fresh.clamp(max=torch.finfo(torch.float32).max))
        history.copy_(history.roll(-1, 0))
        history[0] = 0


KERNELS: dict[str, Callable[..., Any]] = {
    "generic_gemm": generic_gemm,
    "te_general_grouped_gemm": grouped_gemm,
    "layernorm_fwd": layernorm_fwd,
    "layernorm_bwd": layernorm_bwd,
    "rmsnorm_fwd": rmsnorm_fwd,
    "rmsnorm_bwd": rmsnorm_bwd,
    "rmsnorm_bwd_add": rmsnorm_bwd_add,
    "fused_multi_row_padding": pad_rows,
    "fused_multi_row_unpadding": unpad_rows,
    "fused_amax_and_scale_update_after_reduction": update_scales,
    "swap_first_dims": swap_first,
    "get_cublasLt_version": lambda: 130000,
    "get_num_cublas_streams": lambda: 4,
    **attention.KERNELS,
    **formats.KERNELS,
    **optimisers.KERNELS,
    **parts.KERNELS,
}
