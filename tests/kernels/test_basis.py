"""The basis spans the dictionary, and its fitted tail keeps the errors that kernels rely on."""

import math

import pytest
import torch

from moa_megatron.activations import ACTIVATIONS
from moa_megatron.config import ACTIVATION_NAMES, MoAConfig
from moa_megatron.kernels import basis


def _tail(a: float) -> float:
    """Phi(-a)."""
    return 0.5 * math.erfc(a / math.sqrt(2.0))


def _fit(polynomial: tuple[float, ...], a: float) -> float:
    exponent = 0.0
    for coefficient in reversed(polynomial):
        exponent = exponent * a + coefficient
    return 2.0**exponent


def _functions(x: float) -> list[float]:
    positive = max(x, 0.0)
    sigmoid = 1.0 / (1.0 + math.exp(-x))
    return [x, positive, positive**2, x * sigmoid, abs(x) * _tail(abs(x)), math.tanh(x)]


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_the_dictionary_is_a_combination_of_the_basis(name: str) -> None:
    row = basis.expansion(name, leaky_slope=0.2)
    for x in (-7.0, -1.5, -0.2, 0.0, 0.3, 2.0, 6.0):
        value = sum(c * f for c, f in zip(row, _functions(x), strict=True))
        expected = ACTIVATIONS[name].function(torch.tensor(x, dtype=torch.float64), 0.2).item()
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    ("polynomial", "limit", "relative", "absolute"),
    [(basis.TAIL_COARSE, 5.5, 2.7e-4, 3.2e-5), (basis.TAIL_FINE, 9.0, 1.2e-3, 2.5e-7)],
    ids=["coarse", "fine"],
)
def test_errors_of_the_fitted_tail(
    polynomial: tuple[float, ...], limit: float, relative: float, absolute: float
) -> None:
    """Relative to Phi(-a) up to `limit`, absolute for a Phi(-a) everywhere."""
    points = [i / 1000 for i in range(20000)]
    errors = [(a, _fit(polynomial, a), _tail(a)) for a in points]
    assert max(abs(fit / exact - 1.0) for a, fit, exact in errors if a <= limit) <= relative
    assert max(a * abs(fit - exact) for a, fit, exact in errors) <= absolute
    # The leading term is negative, so that outliers go to zero instead of infinity.
    assert polynomial[-1] < 0.0 and _fit(polynomial, 1e4) == 0.0


def test_a_plan_holds_what_the_config_says() -> None:
    plan = basis.plan(MoAConfig(variant="type1", mixing="la"), 19, exact=False, weighted=True)
    assert (plan.width, plan.variant, plan.gate, plan.sizes) == (19, "type1", "none", (5,))
    assert plan.used == (True, True, True, True, True, False)
    assert plan.tail == basis.TAIL_COARSE and plan.weighted and not plan.exact
