"""Gate logits of grouped experts against one product per expert: on a GPU, or interpreted."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moa_megatron.kernels import triton_gates
from tests.helpers.numerics import assert_close
from tests.kernels.triton.test_triton import DEVICE, INTERPRETED, poisoned, pytestmark

__all__ = ["poisoned", "pytestmark"]
TILE = triton_gates.TOKENS
# Full tiles and rests; experts without tokens first, in between and last; one token; none at all.
LOADS = (
    [TILE, 3, 2 * TILE + 1],
    [0, 0, 5, 0, TILE - 1, 0],
    [1],
    [0, 0],
)
OTHER_ORDER = 1e-6


def operands(
    loads: list[int], width: int, coefficients: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(loads) + width)

    def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    x = tensor(sum(loads), width, dtype=dtype).requires_grad_()
    weights = tensor(len(loads), coefficients, width, dtype=dtype).requires_grad_()
    return [x, weights, tensor(sum(loads), coefficients, dtype=torch.float32)]


def expected(x: Tensor, weights: Tensor, upstream: Tensor, loads: list[int]) -> list[Tensor]:
    """Logits and gradients in float64, from one product for each expert."""
    x, weights = (t.detach().double().requires_grad_() for t in (x, weights))
    parts = zip(x.split(loads), weights, strict=True)
    logits = torch.cat([rows @ vectors.T for rows, vectors in parts])
    return [logits.detach(), *torch.autograd.grad(logits, (x, weights), upstream.double())]


def found(x: Tensor, weights: Tensor, upstream: Tensor, loads: list[int]) -> list[Tensor]:
    logits = triton_gates.grouped_logits(x, weights, loads)
    return [logits.detach(), *torch.autograd.grad(logits, (x, weights), upstream)]


@pytest.mark.parametrize("loads", LOADS, ids=str)
@pytest.mark.parametrize(("width", "coefficients"), [(40, 14), (2 * TILE, 7), (130, 28)])
def test_equals_one_product_per_expert(loads: list[int], width: int, coefficients: int) -> None:
    inputs = operands(loads, width, coefficients)
    names = ("logits", "gradient of x", "gradient of the gates")
    for name, *pair in zip(names, found(*inputs, loads), expected(*inputs, loads), strict=True):
        assert_close(name, *pair, OTHER_ORDER)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_not_rounded(dtype: torch.dtype) -> None:
    """Products of such numbers are exact in float32, which is what the mixture gets."""
    loads = [TILE + 2, 0, 9]
    inputs = operands(loads, 96, 14, dtype)
    logits, *gradients = found(*inputs, loads)
    assert logits.dtype == torch.float32
    exact, *expected_gradients = expected(*inputs, loads)
    assert_close("logits", logits, exact, OTHER_ORDER)
    for name, *pair in zip(("x", "gates"), gradients, expected_gradients, strict=True):
        assert pair[0].dtype == dtype
        # The interpreter cuts where hardware rounds.
        assert_close(name, *pair, torch.finfo(dtype).eps * (1.0 if INTERPRETED else 0.5))


def test_sums_are_shared_out_among_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = [5 * TILE + 7, TILE, 0]
    inputs = operands(loads, 48, 14)
    monkeypatch.setattr(triton_gates, "PROGRAMS", 1)
    alone = found(*inputs, loads)
    monkeypatch.setattr(triton_gates, "PROGRAMS", 3 * len(loads))
    shared = found(*inputs, loads)
    assert torch.equal(alone[0], shared[0]) and torch.equal(alone[1], shared[1])
    assert_close("gradient of the gates", shared[2], alone[2], OTHER_ORDER)


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = [4, 3]
    x, weights, upstream = operands(loads, 32, 7)
    launched = []
    launch = triton_gates._launch

    def count(kernel: Any, *words: Any) -> None:
        launched.append(kernel)
        launch(kernel, *words)

    monkeypatch.setattr(triton_gates, "_launch", count)
    triton_gates.grouped_logits(x.detach(), weights, loads).backward(upstream)
    triton_gates.grouped_logits(x, weights.detach(), loads).backward(upstream)
    forward, weight, gradient = (
        triton_gates.gate_forward,
        triton_gates.gate_backward_weight,
        triton_gates.gate_backward_input,
    )
    assert launched == [forward, weight, forward, gradient]


@pytest.mark.parametrize("loads", [[3, 3], [7], [2, 2, 3]], ids=str)
def test_counts_that_do_not_fit_are_an_error(loads: list[int]) -> None:
    x, weights, _ = operands([4, 3], 32, 7)
    with pytest.raises(ValueError, match="add up to the rows"):
        triton_gates.grouped_logits(x, weights, loads)


def _config(dtype: torch.dtype, overlap: bool = False) -> Any:
    return SimpleNamespace(
        sequence_parallel=False,
        expert_model_parallel_size=1,
        tensor_model_parallel_size=1,
        moe_shared_expert_overlap=overlap,
        perform_initialization=True,
        params_dtype=dtype,
    )


def _with_weights(gate: Any, weights: torch.Tensor) -> Any:
    for parameter, vectors in zip(gate.parameters(), weights.detach(), strict=True):
        parameter.data.copy_(vectors)
    return gate


def _check(logits: Any, grad_x: Any, grads: list[Any], case: tuple[Any, ...]) -> None:
    names = ("logits", "gradient of x", "gradient of the gates")
    values = (logits.detach(), grad_x, torch.stack(grads))
    for name, *pair in zip(names, values, expected(*case), strict=True):
        assert_close(name, *pair, OTHER_ORDER)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_grouped_experts_take_these_kernels(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's own choice: one product for all experts, or, for the reference, one each."""
    from moa_megatron import grouped_linear
    from moa_megatron.config import MoAConfig

    loads = [4, 0, 3]
    x, weights, upstream = operands(loads, 32, 14)
    groups: Any = SimpleNamespace(expt_tp=SimpleNamespace(size=lambda: 1))
    config, moa = _config(x.dtype), MoAConfig(backend=backend)
    gate: Any = grouped_linear.MoAGroupedGate(config, moa, 32, groups, range(3)).to(DEVICE)
    # Megatron's copy needs torch's process groups, its product has ten bits on a GPU (TF32).
    monkeypatch.setattr(grouped_linear, "copy_to_tensor_model_parallel_region", lambda w, group: w)
    monkeypatch.setattr(grouped_linear, "gate_logits", lambda x, weight, _: x @ weight.T)
    calls = []
    kernel = triton_gates.grouped_logits
    monkeypatch.setattr(
        triton_gates, "grouped_logits", lambda *words: calls.append(1) or kernel(*words)
    )
    logits = _with_weights(gate, weights)(x, loads)
    assert len(calls) == (backend == "triton")
    grad_x, *grads = torch.autograd.grad(logits, (x, *gate.parameters()), upstream)
    _check(logits, grad_x, grads, (x, weights, upstream, loads))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("scope", ["dense", "expert"])
def test_gates_on_two_streams_keep_off_the_routers_product(
    scope: Any, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one is Transformer Engine's, whose products share one workspace on all streams."""
    from moa_megatron import gates, grouped_linear
    from moa_megatron.config import MoAConfig

    def shared(*words: Any) -> Any:
        raise AssertionError("the product of routers")

    for module in (gates, grouped_linear):
        monkeypatch.setattr(module, "copy_to_tensor_model_parallel_region", lambda v, group: v)
    monkeypatch.setattr(gates, "router_gating_linear", shared)
    loads = [4, 2] if scope == "expert" else [6]
    x, weights, upstream = operands(loads, 32, 14)
    words = (_config(x.dtype, overlap=True), MoAConfig(backend=backend))
    groups: Any = SimpleNamespace(expt_tp=SimpleNamespace(size=lambda: 1))
    if scope == "expert":
        gate: Any = grouped_linear.MoAGroupedGate(*words, 32, groups, range(2)).to(DEVICE)
        logits = _with_weights(gate, weights)(x, loads)
    else:
        gate = gates.MoAGate(*words, "dense", 32, groups.expt_tp).to(DEVICE)
        logits = _with_weights(gate, weights)(x.unflatten(0, (2, 3))).flatten(0, 1)
    grad_x, *grads = torch.autograd.grad(logits, (x, *gate.parameters()), upstream)
    _check(logits, grad_x, grads, (x, weights, upstream, loads))
