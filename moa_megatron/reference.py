"""Fixed, LA and MoA feedforward layers in plain PyTorch: what everything else must agree with.

Shape suffixes: T any leading token dimensions, d model width, D FFN width on this rank,
P = D (Type-I) or 2D (Type-II, y then z), K dictionary size, n coefficients.
Method paper: equations 1-10; method names as in ``MoAConfig``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_megatron.activations import ACTIVATIONS
from moa_megatron.config import MoAConfig


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision the mixture is computed in: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gate(logits_Tn: Tensor, config: MoAConfig) -> Tensor:
    """phi(u . x): gate values of the same shape; softmax runs within each branch."""
    if config.gate == "sigmoid":
        return torch.sigmoid(logits_Tn)
    if config.gate == "tanh":
        return torch.tanh(logits_Tn)
    branches = torch.split(logits_Tn, list(config.branch_sizes), dim=-1)
    return torch.cat([torch.softmax(branch, dim=-1) for branch in branches], dim=-1)


def activate(x_TD: Tensor, config: MoAConfig) -> list[Tensor]:
    """sigma_k(x) for every entry of the dictionary."""
    return [ACTIVATIONS[name].function(x_TD, config.leaky_slope) for name in config.names]


def mix(preact_TP: Tensor, weights_n: list[Tensor], config: MoAConfig) -> Tensor:
    """The hidden vector from pre-activations and n mixing weights that broadcast over D."""
    if config.variant == "type1":
        return _weighted_sum(weights_n, activate(preact_TP, config))
    y_TD, z_TD = preact_TP.chunk(2, dim=-1)
    if config.variant == "one":
        return F.silu(y_TD) * _weighted_sum(weights_n, activate(z_TD, config))
    ys, zs = activate(y_TD, config), activate(z_TD, config)
    if config.variant == "bi":
        size = len(config.names)
        return _weighted_sum(weights_n[:size], ys) * _weighted_sum(weights_n[size:], zs)
    # sum over k of sigma_k(y) * (sum over l >= k of w_kl sigma_l(z))
    size, first, rows = len(zs), 0, []
    for k, y_k in enumerate(ys):
        rows.append(y_k * _weighted_sum(weights_n[first : first + size - k], zs[k:]))
        first += size - k
    return torch.stack(rows).sum(dim=0) if len(rows) > 1 else rows[0]


def mixture_reference(
    preact_TP: Tensor, coefficients: Tensor, config: MoAConfig, token_weight_T: Tensor | None = None
) -> Tensor:
    """The op's contract (see ``moa_megatron.op.mixture``), differentiable by autograd."""
    dtype = compute_dtype(preact_TP.dtype)
    values = coefficients.to(dtype)
    if config.mixing == "moa":
        values = gate(values, config)
    weights_n = list(values.unsqueeze(-1).unbind(dim=-2))
    hidden_TD = mix(preact_TP.to(dtype), weights_n, config)
    if token_weight_T is not None:
        hidden_TD = hidden_TD * token_weight_T.to(dtype).unsqueeze(-1)
    return hidden_TD.to(preact_TP.dtype)


def ffn(
    x_Td: Tensor, w_in_Pd: Tensor, w_out_dD: Tensor, coefficients: Tensor, config: MoAConfig
) -> Tensor:
    """A whole LA or MoA FFN without biases.

    Args:
        x_Td: input, already normalised.
        w_in_Pd: W1, or W1 stacked on W2 for Type-II.
        w_out_dD: the down-projection.
        coefficients: gate vectors U [n, d] (MoA) or the scalars [n] (LA).
    """
    logits = x_Td @ coefficients.T if config.mixing == "moa" else coefficients
    return mixture_reference(x_Td @ w_in_Pd.T, logits, config) @ w_out_dD.T


def fixed_ffn(
    x_Td: Tensor, w_in_Pd: Tensor, w_out_dD: Tensor, activation: str, gated: bool
) -> Tensor:
    """The baseline: W2 sigma(W1 x), or W3 (sigma(W1 x) * W2 x) when ``gated``."""
    function: Callable[[Tensor, float], Tensor] = ACTIVATIONS[activation].function
    preact_TP = x_Td @ w_in_Pd.T
    if not gated:
        return function(preact_TP, 0.01) @ w_out_dD.T
    y_TD, z_TD = preact_TP.chunk(2, dim=-1)
    return (function(y_TD, 0.01) * z_TD) @ w_out_dD.T


def _weighted_sum(weights: list[Tensor], values: list[Tensor]) -> Tensor:
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total
