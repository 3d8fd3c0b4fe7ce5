"""The Triton kernels against the reference in float64: on a GPU, or interpreted on the CPU.

`make interpreted` runs them with TRITON_INTERPRET=1: Triton decides at import whether it compiles.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moa_megatron.config import ACTIVATION_NAMES, MoAConfig
from moa_megatron.kernels import basis
from moa_megatron.op import mixture
from moa_megatron.reference import mixture_reference
from tests.helpers.numerics import assert_close, assert_one_rounding

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a CUDA device, or TRITON_INTERPRET=1 (make interpreted)",
)

VARIANTS = ("type1", "one", "bi", "qd")
GATES = [("moa", "sigmoid"), ("moa", "softmax"), ("moa", "tanh"), ("la", "sigmoid")]
ALIGNED, ODD = 64, 19
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}

variants = pytest.mark.parametrize("variant", VARIANTS)


class Operands(NamedTuple):
    preact: Tensor
    coefficients: Tensor
    token_weight: Tensor
    upstream: Tensor


class Result(NamedTuple):
    hidden: Tensor
    preact: Tensor
    coefficients: Tensor
    token_weight: Tensor


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every output starts as NaN: an element that no kernel writes is noticed."""
    allocate = Tensor.new_empty

    def poison(self: Tensor, *words: Any, **keywords: Any) -> Tensor:
        fresh = allocate(self, *words, **keywords)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(Tensor, "new_empty", poison)
    yield


def _config(variant: Any, **fields: Any) -> MoAConfig:
    return MoAConfig(variant=variant, backend="triton", **fields)


def _operands(
    config: MoAConfig, rows: int = 5, width: int = ODD, dtype: torch.dtype = torch.float32
) -> Operands:
    generator = torch.Generator().manual_seed(width + rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    n = config.num_coefficients
    preact = 2.0 * draw(rows, width * (1 + config.gated))
    coefficients = draw(n) if config.mixing == "la" else draw(rows, n)
    weight = torch.rand(rows, generator=generator)
    operands = preact.to(dtype), coefficients, weight, draw(rows, width).to(dtype)
    return Operands(*(t.to(DEVICE) for t in operands))


def _run(op: Any, operands: Operands, config: MoAConfig) -> Result:
    inputs = [t.detach().clone().requires_grad_() for t in operands[:3]]
    hidden = op(inputs[0], inputs[1], config, inputs[2])
    return Result(hidden.detach(), *torch.autograd.grad(hidden, inputs, operands.upstream))


def _assert_agrees(actual: Result, operands: Operands, config: MoAConfig) -> None:
    expected = _run(mixture_reference, Operands(*(t.double() for t in operands)), config)
    dtype = operands.preact.dtype
    if dtype.itemsize == 2 and not (INTERPRETED and dtype == torch.bfloat16):
        assert_one_rounding("hidden", actual.hidden, expected.hidden)
    elif dtype == torch.bfloat16:
        _assert_one_step(actual.hidden, expected.hidden)
    else:
        assert_close("hidden", actual.hidden, expected.hidden, TOLERANCES[dtype])
    assert_close("preact", actual.preact, expected.preact, TOLERANCES[dtype])
    # Gates and routing weights are float32 here, and so are the sums that lead to their gradients.
    small = 1e-3 if dtype == torch.bfloat16 else 1e-5
    assert_close("coefficients", actual.coefficients, expected.coefficients, small)
    assert_close("token weight", actual.token_weight, expected.token_weight, small)


def _assert_one_step(actual: Tensor, expected: Tensor) -> None:
    """The interpreter cuts float32 to bf16 where the hardware rounds: one step, not a half."""
    step = torch.finfo(torch.bfloat16).eps * expected.abs()
    floor = 1e-6 * expected.square().mean().sqrt().item()
    worst = ((actual.double() - expected).abs() / step.clamp(min=floor)).max().item()
    assert worst <= 1.05, f"hidden: {worst:.2f} steps from the reference"


@variants
@pytest.mark.parametrize(("mixing", "gate"), GATES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_values_and_every_gradient(variant: Any, mixing: Any, gate: Any, dtype: Any) -> None:
    config = _config(variant, mixing=mixing, gate=gate)
    width = ODD if gate == "softmax" or dtype == torch.float16 else ALIGNED
    operands = _operands(config, rows=2, width=width, dtype=dtype)
    _assert_agrees(_run(mixture, operands, config), operands, config)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_each_activation_alone(name: str) -> None:
    for variant in VARIANTS:
        config = _config(variant, dictionary=(name,), leaky_slope=0.2)
        operands = _operands(config)
        _assert_agrees(_run(mixture, operands, config), operands, config)


@pytest.mark.parametrize(
    "names", [("tanh", "relu2"), ("id", "tanh", "gelu"), ("leaky_relu", "silu"), ACTIVATION_NAMES]
)
def test_subsets_in_any_order(names: tuple[str, ...]) -> None:
    for variant in VARIANTS:
        config = _config(variant, dictionary=tuple(reversed(names)))
        operands = _operands(config, dtype=torch.bfloat16)
        _assert_agrees(_run(mixture, operands, config), operands, config)


@variants
@pytest.mark.parametrize("width", [1, 2, 7, 31, 129, 853])
def test_any_width(variant: Any, width: int) -> None:
    config = _config(variant)
    operands = _operands(config, rows=2, width=width)
    _assert_agrees(_run(mixture, operands, config), operands, config)


@variants
def test_any_number_of_rows(variant: Any) -> None:
    config = _config(variant)
    for rows in (0, 1, 4, 9):
        operands = _operands(config, rows=rows)
        _assert_agrees(_run(mixture, operands, config), operands, config)
    learned = dataclasses.replace(config, mixing="la")
    empty = _run(mixture, _operands(learned, rows=0), learned)
    assert torch.equal(empty.coefficients, torch.zeros(learned.num_coefficients, device=DEVICE))


@variants
def test_extreme_inputs(variant: Any) -> None:
    config = _config(variant)
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-3, -1e-3, 30.0, -30.0, 1e4, -1e4])
    width = len(values)
    operands = _operands(config, rows=2, width=width)
    preact = values.roll(3).repeat(2, 1 + config.gated).to(DEVICE)
    for dtype in TOLERANCES:
        if dtype == torch.float16 and config.gated:
            continue  # 1e4 times 1e4 is no float16
        changed = operands._replace(
            preact=preact.to(dtype)
            if dtype != torch.float16
            else preact.clamp(-200, 200).to(dtype),
            upstream=operands.upstream.to(dtype),
        )
        _assert_agrees(_run(mixture, changed, config), changed, config)
    broken = operands._replace(
        preact=preact.index_fill(1, torch.tensor([2], device=DEVICE), torch.nan)
    )
    hidden = _run(mixture, broken, config).hidden
    assert hidden[:, 2].isnan().all() and hidden.isnan().sum() == 2


@variants
def test_strided_input_and_expanded_gradient(variant: Any) -> None:
    config = _config(variant)
    for width in (ODD, ALIGNED):
        operands = _operands(config, rows=2, width=width)
        _assert_agrees(_run(_with_stride, operands, config), operands, config)
    preact = operands.preact.clone().requires_grad_()
    hidden = mixture(preact, operands.coefficients, config, operands.token_weight)
    (summed,) = torch.autograd.grad(hidden.sum(), preact, retain_graph=True)
    ones = torch.ones_like(hidden)
    assert torch.equal(summed, torch.autograd.grad(hidden, preact, ones)[0])


@variants
@pytest.mark.parametrize("mixing", ["moa", "la"])
def test_strided_coefficients_and_weights(variant: Any, mixing: Any) -> None:
    """Views as callers have them: transposed logits, every other weight, one weight for all."""
    config = _config(variant, mixing=mixing)
    operands = _operands(config, rows=3)
    spaced = operands.token_weight.repeat_interleave(2)[::2]
    logits = operands.coefficients.t().contiguous().t()
    for weight in (spaced, operands.token_weight[:1].expand(3)):
        assert not weight.is_contiguous()
        views = operands._replace(coefficients=logits, token_weight=weight)
        inputs = [t.detach().requires_grad_() for t in views[:3]]
        hidden = mixture(inputs[0], inputs[1], config, inputs[2])
        gradients = torch.autograd.grad(hidden, inputs, views.upstream)
        _assert_agrees(Result(hidden.detach(), *gradients), views, config)


@pytest.mark.parametrize("names", [("relu",), ("relu", "relu2"), ("id", "relu2")])
def test_nan_stays_in_every_dictionary(names: tuple[str, ...]) -> None:
    config = _config("type1", dictionary=names)
    preact, coefficients, weight, _ = _operands(config, rows=2)
    preact[1, 3] = torch.nan
    assert mixture(preact, coefficients, config, weight).isnan().sum() == 1


def _with_stride(preact: Tensor, *words: Any) -> Tensor:
    wide = torch.cat([preact, preact.new_zeros(len(preact), 8)], dim=1)
    view = wide[:, : preact.shape[1]]
    assert not view.is_contiguous()
    return mixture(view, *words)


@variants
def test_rows_per_program_do_not_change_a_bit(
    variant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moa_megatron.kernels import triton_op

    config = _config(variant)
    operands = _operands(config, rows=7, width=ALIGNED, dtype=torch.bfloat16)
    results = []
    for rows in (1, 2, 8):
        monkeypatch.setattr(triton_op, "DEFAULT", dict.fromkeys(triton_op.DEFAULT, rows))
        results.append(_run(mixture, operands, config))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@variants
def test_both_tile_forms_agree(variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moa_megatron.kernels import triton_op

    config = _config(variant)
    operands = _operands(config, width=ALIGNED)
    assert triton_op.tiling(ALIGNED, 4, (2 * ALIGNED, 0))["FORM"] == 0
    aligned = _run(mixture, operands, config)
    monkeypatch.setattr(triton_op, "tiling", lambda *_: {"FORM": 1, "VEC": 4, "UNIT": 1})
    for one, other in zip(aligned, _run(mixture, operands, config), strict=True):
        assert_close("form 1", other, one, 1e-6)


def test_tiles_follow_alignment() -> None:
    from moa_megatron.kernels.triton_op import tiling

    assert tiling(2048, 2, (4096, 1024)) == {"FORM": 0, "VEC": 8, "UNIT": 8}
    assert tiling(2048, 4, (4096, 1024)) == {"FORM": 0, "VEC": 4, "UNIT": 4}
    for width, stride, address in [(853, 1706, 0), (2048, 4100, 0), (2048, 4096, 8)]:
        assert tiling(width, 2, (stride, address))["FORM"] == 1


@pytest.mark.parametrize("mistake", ["tail", "matrix", "slope"])
def test_the_bounds_bite(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config("bi")
    operands = _operands(config)
    monkeypatch.setattr(basis, "plan", basis.plan.__wrapped__)  # which would remember
    if mistake == "tail":  # Phi(-a) off by one part in a thousand
        wrong = (basis.TAIL_FINE[0] + 0.00144, *basis.TAIL_FINE[1:])
        monkeypatch.setattr(basis, "TAIL_FINE", wrong)
    elif mistake == "matrix":
        expansion = basis.expansion
        monkeypatch.setattr(basis, "expansion", lambda name, s: expansion(name, s + 1e-3))
    else:
        operands = operands._replace(upstream=operands.upstream * 1.001)
    actual = _run(mixture, operands, config)
    with pytest.raises(AssertionError, match="exceeds"):
        _assert_agrees(actual, operands._replace(upstream=_operands(config).upstream), config)
