"""How close is close: one error metric, one rounding bound, and definitions to measure against."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Scalar float64 definitions, by nothing but `math`: sigma(x, leaky_slope).
DEFINITIONS: dict[str, Callable[[float, float], float]] = {
    "id": lambda x, _: x,
    "relu": lambda x, _: x if x > 0 else 0.0,
    "relu2": lambda x, _: x * x if x > 0 else 0.0,
    "leaky_relu": lambda x, slope: x if x > 0 else slope * x,
    "gelu": lambda x, _: x * 0.5 * math.erfc(-x / math.sqrt(2.0)),
    "silu": lambda x, _: x / (1.0 + math.exp(-x)),
    "tanh": lambda x, _: math.tanh(x),
}


def rms_error(actual: Tensor, expected: Tensor) -> float:
    """RMS of the error over RMS of the reference; 0 for empty tensors, absolute for zero ones."""
    if not expected.numel():
        return 0.0
    expected = expected.double()
    scale = expected.square().mean().sqrt().item() or 1.0
    return (actual.double() - expected).square().mean().sqrt().item() / scale


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Same shape, and a relative RMS error up to `tolerance`; NaN fails."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} against {expected.shape}"
    error = rms_error(actual, expected)
    print(f"{name}: relative RMS error {error:.2e}, bound {tolerance:.2e}")
    assert error <= tolerance, f"{name}: relative RMS error {error:.2e} exceeds {tolerance:.2e}"


def assert_one_rounding(name: str, actual: Tensor, expected: Tensor) -> None:
    """Every element is at most one step of its dtype from the rounded float64 reference.

    Where terms cancel, a result near zero keeps the float32 error of its terms: 1e-6 of the RMS.
    """
    assert expected.dtype == torch.float64 and actual.shape == expected.shape, name
    if not expected.numel():
        return
    kind = torch.finfo(actual.dtype)
    floor = max(kind.smallest_normal * kind.eps, 1e-6 * expected.square().mean().sqrt().item())
    step = (kind.eps * expected.abs()).clamp(min=floor)
    rounded = expected.to(actual.dtype).double()
    worst = ((actual.double() - rounded).abs() / step).max().item()
    print(f"{name}: off by {worst:.2f} steps of {actual.dtype}")
    assert worst <= 1.0, f"{name}: off by {worst:.2f} steps of {actual.dtype}"


def away_from_kinks(*shape: int, seed: int = 0, smallest: float = 0.1) -> Tensor:
    """Random float64 numbers of both signs with magnitudes in [smallest, 2.5]."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.rand(shape, generator=generator, dtype=torch.float64)
    sign = torch.randint(2, shape, generator=generator) * 2 - 1
    return sign * (smallest + magnitude * (2.5 - smallest))
