"""The reference against the equations written out in scalars, and against its closed forms."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moa_megatron.config import MoAConfig
from moa_megatron.reference import activate, ffn, fixed_ffn, gate, mixture_reference
from tests.helpers.numerics import DEFINITIONS, assert_close, away_from_kinks

EXACT = 1e-13  # float64
D_MODEL, D_FFN, TOKENS = 5, 3, 4
variants = pytest.mark.parametrize("variant", ["type1", "one", "bi", "qd"])
gates = pytest.mark.parametrize("gate_name", ["sigmoid", "softmax", "tanh"])


def _phi(logits: list[float], config: MoAConfig) -> list[float]:
    if config.gate == "sigmoid":
        return [1.0 / (1.0 + math.exp(-value)) for value in logits]
    if config.gate == "tanh":
        return [math.tanh(value) for value in logits]
    result: list[float] = []
    for size in config.branch_sizes:
        branch = [math.exp(value) for value in logits[len(result) : len(result) + size]]
        result += [value / sum(branch) for value in branch]
    return result


def _channel(y: float, z: float, weights: list[float], config: MoAConfig) -> float:
    """Equations 1-10 for one channel of one token."""

    def sigma(name: str, x: float) -> float:
        return DEFINITIONS[name](x, config.leaky_slope)

    names, size = config.names, len(config.names)
    if config.variant == "type1":
        return sum(w * sigma(name, y) for w, name in zip(weights, names, strict=True))
    if config.variant == "one":
        mixed = sum(w * sigma(name, z) for w, name in zip(weights, names, strict=True))
        return sigma("silu", y) * mixed
    if config.variant == "bi":
        left = sum(w * sigma(name, y) for w, name in zip(weights[:size], names, strict=True))
        right = sum(w * sigma(name, z) for w, name in zip(weights[size:], names, strict=True))
        return left * right
    remaining, total = iter(weights), 0.0
    for k in range(size):
        for other in range(k, size):
            total += next(remaining) * sigma(names[k], y) * sigma(names[other], z)
    return total


def _written_out(preact: Tensor, coefficients: Tensor, config: MoAConfig) -> Tensor:
    rows = []
    for t, token in enumerate(preact.tolist()):
        width = len(token) // 2 if config.gated else len(token)
        y, z = token[:width], token[width:] or token[:width]
        weights = coefficients.tolist()
        if config.mixing == "moa":
            weights = _phi(weights[t], config)
        rows.append([_channel(y[j], z[j], weights, config) for j in range(width)])
    return torch.tensor(rows, dtype=torch.float64)


def _operands(config: MoAConfig) -> tuple[Tensor, Tensor]:
    preact = away_from_kinks(TOKENS, D_FFN * (1 + config.gated), seed=1)
    n = config.num_coefficients
    shape = (n,) if config.mixing == "la" else (TOKENS, n)
    return preact, away_from_kinks(*shape, seed=2)


def _weights(config: MoAConfig, d_model: int = D_MODEL) -> tuple[Tensor, Tensor, Tensor]:
    """x, W_in, W_out."""
    return (
        away_from_kinks(2, TOKENS, d_model, seed=3),
        away_from_kinks(D_FFN * (1 + config.gated), d_model, seed=4),
        away_from_kinks(d_model, D_FFN, seed=5),
    )


@variants
@gates
def test_moa_is_its_equation(variant: Any, gate_name: Any) -> None:
    config = MoAConfig(variant=variant, gate=gate_name, leaky_slope=0.2)
    preact, logits = _operands(config)
    expected = _written_out(preact, logits, config)
    assert_close(variant, mixture_reference(preact, logits, config), expected, EXACT)


@variants
def test_la_is_its_equation(variant: Any) -> None:
    config = MoAConfig(mixing="la", variant=variant, leaky_slope=0.2)
    preact, scalars = _operands(config)
    expected = _written_out(preact, scalars, config)
    assert_close(variant, mixture_reference(preact, scalars, config), expected, EXACT)


@variants
@pytest.mark.parametrize("mixing", ["la", "moa"])
def test_ffn_projects_in_and_out(variant: Any, mixing: Any) -> None:
    config = MoAConfig(mixing=mixing, variant=variant, gate="sigmoid")
    x, w_in, w_out = _weights(config)
    n = config.num_coefficients
    coefficients = away_from_kinks(*((n,) if mixing == "la" else (n, D_MODEL)), seed=6)
    logits = coefficients if mixing == "la" else torch.einsum("btd,nd->btn", x, coefficients)
    hidden = mixture_reference(torch.einsum("btd,pd->btp", x, w_in), logits, config)
    expected = torch.einsum("btf,df->btd", hidden, w_out)
    assert_close(variant, ffn(x, w_in, w_out, coefficients, config), expected, EXACT)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(DEFINITIONS))
def test_fixed_ffn_is_its_equation(activation: str, gated: bool) -> None:
    config = MoAConfig(variant="bi" if gated else "type1")
    x, w_in, w_out = _weights(config)
    preact = x @ w_in.T
    y = preact[..., :D_FFN]
    mapped = [DEFINITIONS[activation](value, config.leaky_slope) for value in y.flatten().tolist()]
    hidden = torch.tensor(mapped, dtype=torch.float64).view_as(y)
    expected = (hidden * preact[..., D_FFN:] if gated else hidden) @ w_out.T
    assert_close(activation, fixed_ffn(x, w_in, w_out, activation, gated), expected, EXACT)


@variants
def test_zero_gate_vectors_make_every_sigmoid_gate_a_half(variant: Any) -> None:
    moa, la = MoAConfig(variant=variant), MoAConfig(mixing="la", variant=variant)
    x, w_in, w_out = _weights(moa)
    n = moa.num_coefficients
    by_gates = ffn(x, w_in, w_out, torch.zeros(n, D_MODEL, dtype=torch.float64), moa)
    by_scalars = ffn(x, w_in, w_out, torch.full((n,), 0.5, dtype=torch.float64), la)
    assert torch.equal(by_gates, by_scalars)


def test_half_gates_in_closed_form() -> None:
    """bi: a quarter of the product of the two plain sums."""
    config = MoAConfig(variant="bi")
    preact, _ = _operands(config)
    y, z = preact.chunk(2, dim=-1)
    expected = 0.25 * sum(activate(y, config)) * sum(activate(z, config))
    zeros = torch.zeros(TOKENS, config.num_coefficients, dtype=torch.float64)
    assert_close("bi", mixture_reference(preact, zeros, config), torch.as_tensor(expected), EXACT)


def _one_hot(config: MoAConfig, *labels: str) -> Tensor:
    names = config.coefficient_names()
    assert set(labels) <= set(names)
    return torch.tensor([float(name in labels) for name in names], dtype=torch.float64)


def test_quadratic_pair_id_silu_is_swiglu_with_the_projections_renamed() -> None:
    config = MoAConfig(mixing="la", variant="qd")
    x, w_in, w_out = _weights(config)
    w1, w2 = w_in.chunk(2)
    swiglu = fixed_ffn(x, torch.cat([w2, w1]), w_out, "silu", gated=True)
    actual = ffn(x, w_in, w_out, _one_hot(config, "id*silu"), config)
    assert_close("id*silu", actual, swiglu, EXACT)


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu2", "leaky_relu", "relu"])
def test_one_hot_scalars_pick_one_type1_activation(activation: str) -> None:
    config = MoAConfig(mixing="la", variant="type1")
    x, w_in, w_out = _weights(config)
    actual = ffn(x, w_in, w_out, _one_hot(config, f"y:{activation}"), config)
    assert_close(activation, actual, fixed_ffn(x, w_in, w_out, activation, gated=False), EXACT)


@pytest.mark.parametrize(("variant", "labels"), [("one", ["z:id"]), ("bi", ["y:silu", "z:id"])])
def test_one_hot_scalars_give_swiglu(variant: Any, labels: list[str]) -> None:
    config = MoAConfig(mixing="la", variant=variant)
    x, w_in, w_out = _weights(config)
    actual = ffn(x, w_in, w_out, _one_hot(config, *labels), config)
    assert_close(variant, actual, fixed_ffn(x, w_in, w_out, "silu", gated=True), EXACT)


def constant_gates(scalars: Tensor, d_model: int, scale: float) -> Tensor:
    """Vectors on the input (x, 1) whose tanh gates are the constants scalars / scale."""
    vectors = torch.zeros(len(scalars), d_model + 1, dtype=torch.float64)
    vectors[:, -1] = torch.atanh(scalars / scale)
    return vectors


@variants
def test_tanh_moa_on_the_augmented_input_contains_la(variant: Any) -> None:
    """The output projection takes up the scale that tanh, bounded by one, cannot reach."""
    la = MoAConfig(mixing="la", variant=variant)
    moa = MoAConfig(mixing="moa", variant=variant, gate="tanh")
    x, w_in, w_out = _weights(la)
    scalars = away_from_kinks(la.num_coefficients, seed=7)
    scale = 2.0 * scalars.abs().max().item()
    one = torch.ones(*x.shape[:-1], 1, dtype=torch.float64)
    w_in_augmented = torch.cat([w_in, torch.zeros(len(w_in), 1, dtype=torch.float64)], dim=1)
    restored = w_out * scale ** len(la.branch_sizes)
    actual = ffn(
        torch.cat([x, one], dim=-1),
        w_in_augmented,
        restored,
        constant_gates(scalars, D_MODEL, scale),
        moa,
    )
    assert_close(variant, actual, ffn(x, w_in, w_out, scalars, la), EXACT * 10)


@variants
def test_softmax_gates_of_each_branch_sum_to_one(variant: Any) -> None:
    config = MoAConfig(variant=variant, gate="softmax")
    _, logits = _operands(config)
    values = gate(logits, config)
    for branch in values.split(list(config.branch_sizes), dim=-1):
        assert_close("sum", branch.sum(dim=-1), torch.ones(TOKENS).double(), EXACT)
    shifted = gate(logits + 3.0, config)
    assert_close("shift", shifted, values, EXACT)


def test_softmax_over_equal_activations_changes_nothing() -> None:
    """For positive input id, relu and leaky_relu agree, so any convex mixture is the input."""
    config = MoAConfig(variant="type1", gate="softmax", dictionary=("id", "relu", "leaky_relu"))
    preact, logits = _operands(config)
    assert_close("x", mixture_reference(preact.abs(), logits, config), preact.abs(), EXACT)


@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_and_leading_shape_are_the_inputs(variant: Any, dtype: torch.dtype) -> None:
    config = MoAConfig(variant=variant)
    preact, logits = _operands(config)
    for lead in [(), (2,), (1, 2, 3), (0,)]:
        tokens = math.prod(lead)
        hidden = mixture_reference(
            preact[:1]
            .expand(tokens, -1)
            .reshape(*lead, -1 if tokens else preact.shape[1])
            .to(dtype),
            logits[:1].expand(tokens, -1).reshape(*lead, config.num_coefficients),
            config,
        )
        assert hidden.dtype == dtype and hidden.shape == (*lead, D_FFN)


@variants
@pytest.mark.parametrize(
    ("mixing", "gate_name"),
    [("moa", "sigmoid"), ("moa", "softmax"), ("moa", "tanh"), ("la", "sigmoid")],
)
def test_gradcheck(variant: Any, mixing: Any, gate_name: Any) -> None:
    config = MoAConfig(mixing=mixing, variant=variant, gate=gate_name)
    preact, coefficients = _operands(config)
    preact, weight = preact[:2], away_from_kinks(2, seed=8)
    coefficients = coefficients if mixing == "la" else coefficients[:2]
    inputs = tuple(t.requires_grad_() for t in (preact, coefficients, weight))
    assert torch.autograd.gradcheck(lambda p, c, w: mixture_reference(p, c, config, w), inputs)


def test_slope_of_leaky_relu_is_the_configs() -> None:
    config = MoAConfig(mixing="la", variant="type1", dictionary=("leaky_relu",))
    one, x = torch.ones(1).double(), -torch.ones(1, 1).double()
    for slope in (0.01, 0.3):
        hidden = mixture_reference(x, one, dataclasses.replace(config, leaky_slope=slope))
        assert hidden.item() == -slope
