"""Forward and backward of the mixture as two explicit formulas, compiled into one pass each.

Shape suffixes: N tokens, D FFN width on this rank, P = D or 2D, n coefficients, K dictionary size.
The backward recomputes every activation from the pre-activations: nothing else is saved.
"""

from __future__ import annotations

import functools
import shutil
import sysconfig
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_megatron.activations import ACTIVATIONS, Activation
from moa_megatron.config import MoAConfig
from moa_megatron.reference import compute_dtype, gate, mix

Gradients = tuple[Tensor, Tensor, Tensor | None]


def forward(
    preact_NP: Tensor, coefficients: Tensor, token_weight_N: Tensor | None, config: MoAConfig
) -> Tensor:
    """Hidden [N, D] in the dtype of ``preact_NP``; coefficients are [N, n] (MoA) or [n] (LA)."""
    dtype = compute_dtype(preact_NP.dtype)
    weights_n = _columns(_mixing_weights(coefficients, config, dtype))
    hidden_ND = mix(preact_NP.to(dtype), weights_n, config)
    if token_weight_N is not None:
        hidden_ND = hidden_ND * token_weight_N.to(dtype).unsqueeze(-1)
    return hidden_ND.to(preact_NP.dtype)


def backward(
    grad_ND: Tensor,
    preact_NP: Tensor,
    coefficients: Tensor,
    token_weight_N: Tensor | None,
    config: MoAConfig,
) -> Gradients:
    """Gradients of pre-activations, coefficients and token weights, each in its input's dtype."""
    dtype = compute_dtype(preact_NP.dtype)
    weights = _mixing_weights(coefficients, config, dtype)
    preact, grad = preact_NP.to(dtype), grad_ND.to(dtype)
    grad_token_weight_N = None
    if token_weight_N is not None:
        hidden_ND = mix(preact, _columns(weights), config)
        grad_token_weight_N = (grad * hidden_ND).sum(dim=-1).to(token_weight_N.dtype)
        grad = grad * token_weight_N.to(dtype).unsqueeze(-1)
    grad_preact_NP, grad_weights_Nn = _mix_backward(grad, preact, _columns(weights), config)
    if config.mixing == "moa":
        grad_coefficients = _gate_backward(grad_weights_Nn, weights, config)
    else:
        grad_coefficients = grad_weights_Nn.sum(dim=0)
    return (
        grad_preact_NP.to(preact_NP.dtype),
        grad_coefficients.to(coefficients.dtype),
        grad_token_weight_N,
    )


def _mixing_weights(coefficients: Tensor, config: MoAConfig, dtype: torch.dtype) -> Tensor:
    values = coefficients.to(dtype)
    return gate(values, config) if config.mixing == "moa" else values


def _columns(weights: Tensor) -> list[Tensor]:
    """n mixing weights, each [N, 1] (MoA) or [1] (LA)."""
    return list(weights.unsqueeze(-1).unbind(dim=-2))


def _rows(config: MoAConfig) -> list[Activation]:
    return [ACTIVATIONS[name] for name in config.names]


def _mix_backward(
    grad_ND: Tensor, preact_NP: Tensor, weights: list[Tensor], config: MoAConfig
) -> tuple[Tensor, Tensor]:
    """Gradients of the pre-activations [N, P] and of the mixing weights [N, n]."""
    if config.variant == "type1":
        return _branch_backward(grad_ND, preact_NP, weights, config)
    y_ND, z_ND = preact_NP.chunk(2, dim=-1)
    if config.variant == "one":
        silu = ACTIVATIONS["silu"]
        gate_ND = silu.function(y_ND, config.leaky_slope)
        grad_z_ND, grad_weights = _branch_backward(grad_ND * gate_ND, z_ND, weights, config)
        mixed_ND = _branch(z_ND, weights, config)
        grad_y_ND = grad_ND * mixed_ND * silu.derivative(y_ND, config.leaky_slope)
        return torch.cat([grad_y_ND, grad_z_ND], dim=-1), grad_weights
    if config.variant == "bi":
        size = len(config.names)
        mixed_y_ND = _branch(y_ND, weights[:size], config)
        mixed_z_ND = _branch(z_ND, weights[size:], config)
        grad_y_ND, grad_rho = _branch_backward(grad_ND * mixed_z_ND, y_ND, weights[:size], config)
        grad_z_ND, grad_pi = _branch_backward(grad_ND * mixed_y_ND, z_ND, weights[size:], config)
        return torch.cat([grad_y_ND, grad_z_ND], dim=-1), torch.cat([grad_rho, grad_pi], dim=-1)
    return _pairs_backward(grad_ND, y_ND, z_ND, weights, config)


def _branch(x_ND: Tensor, weights: list[Tensor], config: MoAConfig) -> Tensor:
    return sum(
        (w * row.function(x_ND, config.leaky_slope) for w, row in zip(weights, _rows(config))),
        start=torch.zeros_like(x_ND),
    )


def _branch_backward(
    grad_ND: Tensor, x_ND: Tensor, weights: list[Tensor], config: MoAConfig
) -> tuple[Tensor, Tensor]:
    slope = torch.zeros_like(x_ND)
    grad_weights = []
    for weight, row in zip(weights, _rows(config), strict=True):
        slope = slope + weight * row.derivative(x_ND, config.leaky_slope)
        grad_weights.append((grad_ND * row.function(x_ND, config.leaky_slope)).sum(dim=-1))
    return grad_ND * slope, torch.stack(grad_weights, dim=-1)


def _pairs_backward(
    grad_ND: Tensor, y_ND: Tensor, z_ND: Tensor, weights: list[Tensor], config: MoAConfig
) -> tuple[Tensor, Tensor]:
    rows, leaky_slope = _rows(config), config.leaky_slope
    zs = [row.function(z_ND, leaky_slope) for row in rows]
    grad_ys = [grad_ND * row.function(y_ND, leaky_slope) for row in rows]
    slope_y, grad_zs = torch.zeros_like(y_ND), [torch.zeros_like(z_ND) for _ in rows]
    grad_weights = []
    for weight, (k, m) in zip(weights, config.pairs, strict=True):
        slope_y = slope_y + weight * zs[m] * rows[k].derivative(y_ND, leaky_slope)
        grad_zs[m] = grad_zs[m] + weight * grad_ys[k]
        grad_weights.append((grad_ys[k] * zs[m]).sum(dim=-1))
    grad_z = sum(
        (g * row.derivative(z_ND, leaky_slope) for g, row in zip(grad_zs, rows, strict=True)),
        start=torch.zeros_like(z_ND),
    )
    return torch.cat([grad_ND * slope_y, grad_z], dim=-1), torch.stack(grad_weights, dim=-1)


def _gate_backward(grad_Nn: Tensor, gates_Nn: Tensor, config: MoAConfig) -> Tensor:
    if config.gate == "sigmoid":
        return grad_Nn * gates_Nn * (1.0 - gates_Nn)
    if config.gate == "tanh":
        return grad_Nn * (1.0 - gates_Nn.square())
    sizes = list(config.branch_sizes)
    parts = []
    for grad, value in zip(grad_Nn.split(sizes, dim=-1), gates_Nn.split(sizes, dim=-1)):
        parts.append(value * (grad - (grad * value).sum(dim=-1, keepdim=True)))
    return torch.cat(parts, dim=-1)


def compiler_missing() -> str | None:
    """Why torch.compile cannot build CPU code here, or None when it can."""
    from torch._inductor import config as inductor

    # Inductor takes the first of these, and g++ or $CXX is all it lists on Linux.
    candidates = [name for name in inductor.cpp.cxx if name]
    if not any(shutil.which(name) for name in candidates):
        return f"no C++ compiler ({' or '.join(candidates)}) on PATH"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python.h (Debian and Ubuntu: apt install python3-dev)"
    return None


@functools.cache
def compiled(
    config: MoAConfig, dtype: torch.dtype, weighted: bool
) -> tuple[Callable[..., Tensor], Callable[..., Gradients]]:
    """``forward`` and ``backward`` compiled for one config and dtype; token counts may vary.

    ``weighted`` says whether token weights are passed. Each pair owns its code objects: Dynamo
    counts recompilations per code object and gives up beyond a limit.
    """
    del dtype, weighted
    return _compile(forward, config), _compile(backward, config)


def _compile(function: Callable[..., Any], config: MoAConfig) -> Callable[..., Any]:
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, (config,)
    )
    return torch.compile(own, dynamic=True, fullgraph=True)
