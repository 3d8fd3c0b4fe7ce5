"""The op: one public function, one autograd rule, several implementations behind it.

==========  ================================================  =======================
backend     implementation                                    runs on
==========  ================================================  =======================
triton      ``kernels.triton_op``                             CUDA devices
compiled    ``kernels.cpu_op``, C++ built on first use        CPU, with a C++ compiler
reference   ``reference``, recomputed in the backward pass    everywhere, slowly
==========  ================================================  =======================

The first two are the custom operators ``moa_megatron::mixture`` and ``mixture_backward``:
torch.compile sees one node each, activation recompute and CUDA graphs any other op.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa_megatron.config import MoAConfig
from moa_megatron.reference import mixture_reference

logger = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    flat = _in_rows(preact.reshape(-1, width))
    if _constant_backend(config.backend, preact.device.type, preact.dtype) != "reference":
        hidden = _fused(flat, rows, weight, config.encoded)
    elif torch.compiler.is_compiling():
        hidden = mixture_reference(flat, rows, config, weight)  # the compiler chooses what to keep
    else:
        hidden = _Recomputed.apply(flat, rows, weight, config)
    return hidden.view(*lead, hidden_width)


def _in_rows(tensor: Tensor) -> Tensor:
    """The same values with neighbouring columns in neighbouring addresses; rows may be strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.cache
def resolve_backend(requested: str, device: str, dtype: torch.dtype) -> str:
    """The implementation that serves ``requested`` on ``device``; says so once in the log.

    Raises:
        ValueError: when a backend is forced that cannot run here.
    """
    if requested == "auto":
        fast = "triton" if device == "cuda" else "compiled"
        obstacle = _obstacle(fast, device, dtype)
        chosen = "reference" if obstacle else fast
        why = f"slow; {fast} cannot run: {obstacle}" if obstacle else "the fastest here"
    else:
        obstacle = None if requested == "reference" else _obstacle(requested, device, dtype)
        if obstacle:
            raise ValueError(
                f"backend={requested!r} cannot run on {device}: {obstacle}; or use 'auto'"
            )
        chosen, why = requested, "as asked"
    logger.info("mixture of activations on %s: %s backend (%s)", device, chosen, why)
    return chosen


def _constant_backend(requested: str, device: str, dtype: torch.dtype) -> str:
    """``resolve_backend`` for code that torch.compile traces: it must not trace the choice."""
    return resolve_backend(requested, device, dtype)


# All that torch.compiler.assume_constant_result does, without its import of Dynamo (1 s at start).
_constant_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _obstacle(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot serve this device and dtype, with the fix; None when it can."""
    if dtype not in _DTYPES:
        return f"{dtype} is served by 'reference' only"
    if backend == "triton":
        try:
            from moa_megatron.kernels import triton_op
        except ImportError as error:
            return f"triton is not importable ({error}): install torch's own version of it"
        return triton_op.unavailable(device)
    from moa_megatron.kernels import cpu_op

    return cpu_op.unavailable() if device == "cpu" else "it is for CPU tensors"


def build(config: MoAConfig, device: str, dtype: torch.dtype) -> float:
    """Builds what the first call would build; returns the seconds this took."""
    if resolve_backend(config.backend, device, dtype) != "compiled":
        return 0.0
    from moa_megatron.kernels import cpu_op

    return cpu_op.prepare(config)


def _kernels(device: torch.device, config: MoAConfig) -> ModuleType:
    if device.type == "cuda" or config.backend == "triton":
        from moa_megatron.kernels import triton_op

        return triton_op
    from moa_megatron.kernels import cpu_op

    return cpu_op


@torch.library.custom_op("moa_megatron::mixture", mutates_args=())
def _fused(preact: Tensor, coefficients: Tensor, weight: Tensor | None, config: str) -> Tensor:
    settings = MoAConfig.decode(config)
    hidden: Tensor = _kernels(preact.device, settings).forward(
        preact, coefficients, weight, settings
    )
    return hidden


@_fused.register_fake
def _(preact: Tensor, coefficients: Tensor, weight: Tensor | None, config: str) -> Tensor:
    rows, width = preact.shape
    return preact.new_empty(rows, width // (1 + MoAConfig.decode(config).gated))


@torch.library.custom_op("moa_megatron::mixture_backward", mutates_args=())
def _fused_backward(
    grad: Tensor, preact: Tensor, coefficients: Tensor, weight: Tensor | None, config: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pre-activations, coefficients, token weights (empty where there are none)."""
    settings = MoAConfig.decode(config)
    kernels = _kernels(preact.device, settings)
    grads = kernels.backward(grad, preact, coefficients, weight, settings)
    return grads[0], grads[1], preact.new_empty(0) if grads[2] is None else grads[2]


@_fused_backward.register_fake
def _(
    grad: Tensor, preact: Tensor, coefficients: Tensor, weight: Tensor | None, config: str
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = preact.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return (
        preact.new_empty(preact.shape),
        coefficients.new_empty(coefficients.shape),
        grad_weight,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    preact, coefficients, weight, config = inputs
    ctx.save_for_backward(preact, coefficients, weight)
    ctx.config = config


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    preact, coefficients, weight = ctx.saved_tensors  # once: activation recompute unpacks here
    grads = _fused_backward(_in_rows(grad), preact, coefficients, weight, ctx.config)
    return grads[0], grads[1], None if weight is None else grads[2], None


_fused.register_autograd(_differentiate, setup_context=_keep)


class _Recomputed(torch.autograd.Function):
    """The reference, evaluated again in the backward pass: keeps the arguments only."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, preact: Tensor, coefficients: Tensor, weight: Tensor | None, config: MoAConfig
    ) -> Tensor:
        ctx.save_for_backward(preact, coefficients, weight)
        ctx.config = config
        return mixture_reference(preact, coefficients, config, weight)

    @staticmethod
    @once_differentiable  # a second derivative would silently come out as zero
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors if t is not None]
        with torch.enable_grad():
            hidden = mixture_reference(inputs[0], inputs[1], ctx.config, *inputs[2:])
        grads = torch.autograd.grad(hidden, inputs, grad)
        return grads[0], grads[1], grads[2] if len(inputs) > 2 else None, None


def _check(
    preact: Tensor, coefficients: Tensor, config: MoAConfig, token_weight: Tensor | None
) -> None:
    lead, n = preact.shape[:-1], config.num_coefficients
    problems = []
    if config.mixing == "fixed":
        problems.append("mixing='fixed' has no mixture: use Megatron's own MLP")
    if not preact.is_floating_point():
        problems.append(f"preact.dtype={preact.dtype}: must be a floating-point type")
    if preact.shape[-1] == 0:
        problems.append("preact has last dimension 0: an FFN has at least one column")
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
    for name, tensor in (("coefficients", coefficients), ("token_weight", token_weight)):
        if tensor is not None and tensor.device != preact.device:
            problems.append(f"{name} is on {tensor.device}, preact on {preact.device}: move one")
    if problems:
        raise ValueError("mixture: " + "; ".join(problems))
