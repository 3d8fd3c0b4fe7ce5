"""Each row of the dictionary against its definition, and its derivative against autograd."""

import pytest
import torch

from moa_megatron.activations import ACTIVATIONS
from moa_megatron.config import ACTIVATION_NAMES
from tests.helpers.numerics import DEFINITIONS, assert_close, away_from_kinks

SLOPE = 0.17
KINKED = {"relu", "relu2", "leaky_relu"}
names = pytest.mark.parametrize("name", ACTIVATION_NAMES)
dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-7)], ids=str
)


def test_names_agree_with_config_and_definitions() -> None:
    assert tuple(ACTIVATIONS) == ACTIVATION_NAMES
    assert set(ACTIVATIONS) == set(DEFINITIONS)


@names
@dtypes
def test_function_is_its_definition(name: str, dtype: torch.dtype, tolerance: float) -> None:
    x = torch.cat([away_from_kinks(500, smallest=0.0) * 4, torch.zeros(1, dtype=torch.float64)])
    x = x.to(dtype)
    expected = [DEFINITIONS[name](value, SLOPE) for value in x.tolist()]
    actual = ACTIVATIONS[name].function(x, SLOPE)
    assert actual.dtype == dtype
    assert_close(name, actual, torch.tensor(expected, dtype=torch.float64), tolerance)


@names
@dtypes
def test_derivative_is_autograds(name: str, dtype: torch.dtype, tolerance: float) -> None:
    x = (away_from_kinks(500) * 4).to(dtype).requires_grad_()
    y = ACTIVATIONS[name].function(x.double(), SLOPE)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y))
    actual = ACTIVATIONS[name].derivative(x.detach(), SLOPE)
    assert actual.dtype == dtype
    assert_close(f"{name}'", actual, expected, tolerance * 2)


@names
def test_derivative_at_zero_is_the_one_from_the_left(name: str) -> None:
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(ACTIVATIONS[name].function(zero, SLOPE), zero)
    actual = ACTIVATIONS[name].derivative(zero.detach(), SLOPE).item()
    assert actual == expected.item()
    if name in KINKED:
        assert actual == DEFINITIONS[name](-1.0, SLOPE) / -1.0


@names
def test_gradcheck(name: str) -> None:
    x = away_from_kinks(20).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ACTIVATIONS[name].function(t, SLOPE), x)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_input_stays_finite(name: str, dtype: torch.dtype) -> None:
    largest = 200.0
    x = torch.tensor([-largest, largest], dtype=dtype)
    row = ACTIVATIONS[name]
    for values in (row.function(x, SLOPE), row.derivative(x, SLOPE)):
        assert values.dtype == dtype and values.isfinite().all()
