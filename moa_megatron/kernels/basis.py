"""The dictionary rewritten in six functions that are cheap together: shared by all kernels.

Every activation is a fixed linear combination of the basis, so a mixture of K activations is one of
at most six basis functions with coefficients folded per token (kernels/README.md derives it):

==========  ===================================  ============================
basis       value b(x)                           derivative b'(x)
==========  ===================================  ============================
x           x                                    1
relu        max(x, 0)                            [x > 0]
relu2       max(x, 0)^2                          2 max(x, 0)
silu        x s, s = 1 / (1 + exp(-x))           s + x s (1 - s)
tail        |x| Phi(-|x|)                        sign(x) (Phi(-|x|) - |x| phi(x))
tanh        2 / (1 + exp(-2x)) - 1               1 - tanh(x)^2
==========  ===================================  ============================

``Phi(-|x|) = 2^Q(|x|)`` with a polynomial Q: one exponential, and the error is relative, so that
the far tail of GELU keeps its digits. Importing this module needs neither torch nor triton.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from moa_megatron.config import MoAConfig

BASIS = ("x", "relu", "relu2", "silu", "tail", "tanh")

# Minimax fits of log2 Phi(-a), lowest power first; tests/kernels/test_basis.py holds their errors.
# Coarse: relative error 2.6e-4 of Phi(-a) up to a = 5.5, a 15th of a bf16 rounding.
# Fine: absolute error 2.4e-7 of a Phi(-a), for float32 and float16.
TAIL_COARSE = (-1.00037599, -1.14634764, -0.4694722, -0.0447202325, 4.89623239e-3, -2.35215295e-4)
TAIL_FINE = (
    -1.00000489,
    -1.15114176,
    -0.458832234,
    -0.0534703881,
    8.20897799e-3,
    -8.43162532e-4,
    4.99681955e-5,
    -1.26747284e-6,
)


def expansion(name: str, leaky_slope: float) -> tuple[float, ...]:
    """Coefficients of one activation in ``BASIS``.

    Raises:
        KeyError: for a name that is not in the dictionary of ``moa_megatron.activations``.
    """
    terms: dict[str, dict[str, float]] = {
        "id": {"x": 1.0},
        "relu": {"relu": 1.0},
        "relu2": {"relu2": 1.0},
        "leaky_relu": {"x": leaky_slope, "relu": 1.0 - leaky_slope},
        "gelu": {"relu": 1.0, "tail": -1.0},
        "silu": {"silu": 1.0},
        "tanh": {"tanh": 1.0},
    }
    return tuple(terms[name].get(function, 0.0) for function in BASIS)


class Plan(NamedTuple):
    """What a kernel is compiled for, but for the shape of its tiles.

    A tuple, because the autotuner writes it to its cache file.
    """

    width: int
    """D, columns of the hidden vector."""
    variant: str
    gate: str
    """Gate function, or ``none`` for learned coefficients."""
    sizes: tuple[int, ...]
    """Coefficients per branch."""
    matrix: tuple[tuple[float, ...], ...]
    """K rows of six: the dictionary in ``BASIS``."""
    used: tuple[bool, ...]
    """Which basis functions the dictionary needs."""
    tail: tuple[float, ...]
    """Polynomial of log2 Phi(-a), lowest power first."""
    exact: bool
    """Whether results keep float32 accuracy; False where bf16 rounds them anyway."""
    weighted: bool
    """Whether each token has a routing weight."""


@functools.cache
def plan(config: MoAConfig, width: int, exact: bool, weighted: bool) -> Plan:
    """The kernel's settings for one config, D, accuracy and presence of token weights."""
    matrix = tuple(expansion(name, config.leaky_slope) for name in config.names)
    return Plan(
        width=width,
        variant=config.variant,
        gate=config.gate if config.mixing == "moa" else "none",
        sizes=config.branch_sizes,
        matrix=matrix,
        used=tuple(any(column) for column in zip(*matrix, strict=True)),
        tail=TAIL_FINE if exact else TAIL_COARSE,
        exact=exact,
        weighted=weighted,
    )
