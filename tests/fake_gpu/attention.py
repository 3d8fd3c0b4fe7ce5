"""Kernels of Transformer Engine around its unfused attention: rotary positions, softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _rotated(
    x: Tensor, angles: Tensor, starts: Any, form: Any, interleaved: bool, *rest: Any, sign: int
) -> Tensor:
    """x [s, b, h, d] with its first dimensions turned; angles [s, 1, 1, d'] repeat their halves."""
    cumulative, ranks, _ = rest
    plain = starts is None and not interleaved and cumulative is None and ranks == 1
    assert plain and form.name == "NVTE_SBHD", "not emulated"
    turned, kept = x.float().split([angles.shape[-1], x.shape[-1] - angles.shape[-1]], dim=-1)
    angles = angles[: len(x)]
    first, second = turned.chunk(2, dim=-1)
    across = torch.cat([-second, first], dim=-1)
    turned = turned * angles.cos() + sign * across * angles.sin()
    return torch.cat([turned, kept], dim=-1).to(x.dtype)


def rope_forward(x: Tensor, *rest: Any) -> Tensor:
    """``tex.fused_rope_forward``."""
    return _rotated(x, *rest, sign=1)


def rope_backward(grad: Tensor, *rest: Any) -> Tensor:
    """``tex.fused_rope_backward``: turns back."""
    return _rotated(grad, *rest, sign=-1)


def softmax(x: Tensor, scale: float) -> Tensor:
    """``tex.scaled_softmax_forward`` over the last dimension."""
    return (x.float() * scale).softmax(-1).to(x.dtype)


def masked_softmax(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """``tex.scaled_masked_softmax_forward``: nothing where the mask is true."""
    return softmax(x.masked_fill(mask.bool(), -torch.inf), scale)


def causal_softmax(x: Tensor, scale: float) -> Tensor:
    """``tex.scaled_upper_triang_masked_softmax_forward``, and the one aligned to the end."""
    rows, columns = x.shape[-2:]
    later = torch.ones(rows, columns, dtype=torch.bool).triu(1 + columns - rows)
    return masked_softmax(x, later, scale)


def softmax_backward(grad: Tensor, result: Tensor, scale: float) -> Tensor:
    """The gradient of all of them: what is masked has a result of zero."""
    inner, result = grad.float(), result.float()
    change = (inner - (inner * result).sum(-1, keepdim=True)) * result * scale
    return change.to(grad.dtype)


def no_fused_attention(*rest: Any) -> Any:
    """``tex.get_fused_attn_backend``: Transformer Engine takes its unfused attention."""
    import transformer_engine_torch as tex

    return tex.NVTE_Fused_Attn_Backend.NVTE_No_Backend


KERNELS: dict[str, Callable[..., Any]] = {
    "get_fused_attn_backend": no_fused_attention,
    "fused_rope_forward": rope_forward,
    "fused_rope_backward": rope_backward,
    "scaled_softmax_forward": softmax,
    "scaled_masked_softmax_forward": masked_softmax,
    "scaled_upper_triang_masked_softmax_forward": causal_softmax,
    "scaled_aligned_causal_masked_softmax_forward": causal_softmax,
    "scaled_softmax_backward": softmax_backward,
    "scaled_masked_softmax_backward": softmax_backward,
    "scaled_upper_triang_masked_softmax_backward": softmax_backward,
    "scaled_aligned_causal_masked_softmax_backward": softmax_backward,
}
