"""Apex's extension of this name, in plain PyTorch: weight gradients added up in one product."""

from torch import Tensor


def wgrad_gemm_accum_fp32(x: Tensor, grad: Tensor, total: Tensor) -> None:
    """total [n, d] += grad [..., n]^T x [..., d]."""
    product = grad.detach().float().flatten(0, -2).T @ x.detach().float().flatten(0, -2)
    total.data.add_(product.to(total.dtype))


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
