"""The op: one public function, one autograd rule, several implementations behind it."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa_megatron import fused
from moa_megatron.config import MoAConfig
from moa_megatron.reference import mixture_reference

logger = logging.getLogger(__name__)


def mixture(
    preact: Tensor, coefficients: Tensor, config: MoAConfig, token_weight: Tensor | None = None
) -> Tensor:
    """Mix activations of pre-activations (method paper, equations 3-10).

    Args:
        preact: [..., D] for Type-I; [..., 2D] for Type-II: y = W1 x first, then z = W2 x.
        coefficients: MoA: gate logits [..., n], before the gate function; LA: the scalars, [n].
            Order: type1, one: dictionary order; bi: the K of y, then the K of z; qd: pairs
            (k, l), k <= l, row-major over the dictionary.
        token_weight: [...], multiplies the hidden vector of each token, or None.

    Returns:
        hidden [..., D] in ``preact``'s dtype, computed in float32 (float64 for float64 input).
        Every gradient is defined and deterministic; only the arguments are kept for it.

    Raises:
        ValueError: where shapes, dtypes or the config do not fit together.
    """
    _check(preact, coefficients, config, token_weight)
    lead, width = preact.shape[:-1], preact.shape[-1]
    hidden_width = width // 2 if config.gated else width
    rows = (
        coefficients if config.mixing == "la" else coefficients.reshape(-1, coefficients.shape[-1])
    )
    weight = None if token_weight is None else token_weight.reshape(-1)
    hidden = _Mixture.apply(preact.reshape(-1, width), rows, weight, config)
    return hidden.view(*lead, hidden_width)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, preact: Tensor, coefficients: Tensor, weight: Tensor | None, config: MoAConfig
    ) -> Tensor:
        ctx.save_for_backward(preact, coefficients, weight)
        ctx.config = config
        if _runs_compiled(preact, config):
            run, _ = fused.compiled(config, preact.dtype, weight is not None)
            hidden: Tensor = run(preact, coefficients, weight)
            return hidden
        return mixture_reference(preact, coefficients, config, weight)

    @staticmethod
    @once_differentiable  # a second derivative would silently come out as zero
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        preact, coefficients, weight = ctx.saved_tensors
        config = ctx.config
        if _runs_compiled(preact, config):
            _, run = fused.compiled(config, preact.dtype, weight is not None)
            return *run(grad, preact, coefficients, weight), None
        inputs = [
            t.detach().requires_grad_() for t in (preact, coefficients, weight) if t is not None
        ]
        with torch.enable_grad():
            hidden = mixture_reference(inputs[0], inputs[1], config, *inputs[2:])
        grads = torch.autograd.grad(hidden, inputs, grad)
        return grads[0], grads[1], grads[2] if weight is not None else None, None


def _runs_compiled(preact: Tensor, config: MoAConfig) -> bool:
    # Dynamo treats sizes 0 and 1 as constants: an expert that gets one token would compile anew.
    return resolve_backend(config.backend, preact.device.type) == "compiled" and len(preact) > 1


@functools.cache
def resolve_backend(requested: str, device: str) -> str:
    """The implementation that serves ``requested`` on ``device``; says so once in the log.

    Raises:
        ValueError: when a backend is forced that cannot run here.
    """
    missing = fused.compiler_missing() if device == "cpu" else None
    if requested == "compiled" and missing:
        raise ValueError(
            f"backend='compiled' cannot run on {device}: {missing}; install one or use 'auto'"
        )
    # Compiling takes a minute, and again for some shapes: no default (docs/decisions.md).
    chosen = "reference" if requested == "auto" else requested
    why = "plain PyTorch, no compile time" if requested == "auto" else "as asked"
    logger.info("mixture of activations on %s: %s backend (%s)", device, chosen, why)
    return chosen


def _check(
    preact: Tensor, coefficients: Tensor, config: MoAConfig, token_weight: Tensor | None
) -> None:
    lead, n = preact.shape[:-1], config.num_coefficients
    problems = []
    if config.mixing == "fixed":
        problems.append("mixing='fixed' has no mixture: use Megatron's own MLP")
    if not preact.is_floating_point():
        problems.append(f"preact.dtype={preact.dtype}: must be a floating-point type")
    if config.gated and preact.shape[-1] % 2:
        problems.append(f"preact has last dimension {preact.shape[-1]}: Type-II needs y and z, 2D")
    expected = (n,) if config.mixing == "la" else (*lead, n)
    if tuple(coefficients.shape) != tuple(expected):
        problems.append(
            f"coefficients have shape {tuple(coefficients.shape)}: expected {tuple(expected)}"
        )
    if token_weight is not None and token_weight.shape != lead:
        problems.append(
            f"token_weight has shape {tuple(token_weight.shape)}: expected {tuple(lead)}"
        )
    if problems:
        raise ValueError("mixture: " + "; ".join(problems))
