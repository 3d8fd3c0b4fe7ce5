"""The dictionary of activations: adding one is adding a row to ``ACTIVATIONS``.

Every function and derivative maps a floating tensor elementwise and keeps its dtype. Derivatives at
a kink (0 for the ReLU family) take the value from the left, as PyTorch does.
Source: method paper section 3 (GELU is exact, x * Phi(x)) and section 5.1 (the entries).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_INV_SQRT_2 = 1.0 / math.sqrt(2.0)
_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)


@dataclass(frozen=True)
class Activation:
    """One row: ``function(x, leaky_slope)`` and its elementwise ``derivative(x, leaky_slope)``."""

    function: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]


def _gelu_derivative(x: Tensor, _slope: float) -> Tensor:
    cdf = 0.5 * (1.0 + torch.erf(x * _INV_SQRT_2))
    return cdf + x * torch.exp(-0.5 * x * x) * _INV_SQRT_2PI


def _silu_derivative(x: Tensor, _slope: float) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


def _leaky_derivative(x: Tensor, slope: float) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), torch.full_like(x, slope))


ACTIVATIONS: dict[str, Activation] = {
    "id": Activation(lambda x, _: x, lambda x, _: torch.ones_like(x)),
    "relu": Activation(lambda x, _: F.relu(x), lambda x, _: (x > 0).to(x.dtype)),
    "relu2": Activation(lambda x, _: F.relu(x).square(), lambda x, _: 2.0 * F.relu(x)),
    "leaky_relu": Activation(lambda x, slope: F.leaky_relu(x, slope), _leaky_derivative),
    "gelu": Activation(lambda x, _: F.gelu(x), _gelu_derivative),
    "silu": Activation(lambda x, _: F.silu(x), _silu_derivative),
    "tanh": Activation(lambda x, _: torch.tanh(x), lambda x, _: 1.0 - torch.tanh(x).square()),
}
