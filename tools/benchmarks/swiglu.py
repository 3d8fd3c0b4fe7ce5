"""Fixed activations that MoA is held against: upstream's fusion, torch.compile, plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.benchmarks import report

Activation = Callable[[Tensor, Tensor | None], Tensor]
"""Hidden [N, D] from pre-activations [N, 2D] (or [N, D]) and token weights [N] or None."""


def swiglu(preact: Tensor, weight: Tensor | None) -> Tensor:
    """silu(y) * z in plain PyTorch."""
    y, z = preact.chunk(2, dim=-1)
    hidden = F.silu(y) * z
    return hidden if weight is None else (hidden * weight.unsqueeze(-1)).to(preact.dtype)


def gelu(preact: Tensor, weight: Tensor | None) -> Tensor:
    """The ungated layer's activation, in plain PyTorch."""
    hidden = F.gelu(preact)
    return hidden if weight is None else (hidden * weight.unsqueeze(-1)).to(preact.dtype)


def upstream(preact: Tensor, weight: Tensor | None) -> Tensor:
    """Megatron's fused SwiGLU, or its weighted form; torch.compile builds both."""
    from megatron.core.fusions import fused_bias_swiglu as fused

    if weight is None:
        return fused.bias_swiglu_impl(preact, None)
    return fused.weighted_bias_swiglu_impl(preact, None, weight.unsqueeze(-1))


def compiled(function: Activation, preact: Tensor, weight: Tensor | None) -> Activation | None:
    """``function`` under torch.compile, built for these shapes; None, with a word why, if it fails.

    Earlier builds are dropped: a second shape would otherwise get slower code for any shape.
    """
    torch.compiler.reset()
    built: Activation = torch.compile(function, dynamic=False)
    try:
        hidden = built(preact, weight)
        hidden.backward(torch.ones_like(hidden), inputs=[preact])
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        report.say(f"torch.compile cannot build the baseline, it runs in plain PyTorch: {reason}")
        return None
    finally:
        preact.grad = None
    return built


def activations(preact: Tensor, weight: Tensor | None, gated: bool) -> dict[str, Activation]:
    """The fixed activations that run here, by name.

    Upstream's fusion takes part on CUDA only: on the CPU it is the compiled one in other words.
    """
    plain = swiglu if gated else gelu
    fast = compiled(plain, preact, weight)
    found: dict[str, Activation] = {"eager": plain}
    if fast is not None:
        found["compiled"] = fast
    if gated and preact.is_cuda:
        found["upstream"] = upstream
    return found
