"""Grouped experts on a GPU: every kind against the definition and each other, FP8, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moa_megatron.config import MoAConfig
from tests.helpers.numerics import assert_close
from tools.benchmarks import ffn, grouped
from tools.benchmarks.timing import saved_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
engine = pytest.mark.skipif(not grouped.has_engine(), reason="needs Transformer Engine")
KINDS = ["sequential", "grouped", pytest.param("engine", marks=engine)]
# Counts of no particular multiple, and an expert without tokens.
LOADS = [37, 0, 128, 5]
SHAPE = grouped.Shape("bf16", sum(LOADS), 256, 128, len(LOADS))
CUDA = torch.device("cuda")


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    with ffn.megatron(CUDA):
        yield


def _settings(variant: Any = "bi", scope: Any = "expert") -> MoAConfig:
    return MoAConfig(variant=variant, gate_scope=scope, gate_init_std=0.3)


@pytest.mark.parametrize("scope", ["layer", "expert"])
@pytest.mark.parametrize("variant", ["one", "bi", "qd"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind: str, variant: str, scope: str) -> None:
    inputs = grouped.make_inputs(SHAPE, CUDA, LOADS)
    experts = grouped.build(kind, SHAPE, _settings(variant, scope), CUDA)
    print(grouped.check(experts, SHAPE, inputs))


@pytest.mark.parametrize("scope", ["layer", "expert"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_equals_sequential_experts(kind: str, scope: str) -> None:
    """From the same weights: values and gradients up to the rounding of bfloat16."""
    moa = _settings("qd", scope)
    inputs = grouped.make_inputs(SHAPE, CUDA, LOADS)
    one, other = (grouped.build(name, SHAPE, moa, CUDA) for name in ("sequential", kind))
    with torch.no_grad():
        for index in range(SHAPE.experts):
            for name, matrix in grouped.matrices(other, index).items():
                matrix.copy_(grouped.matrices(one, index)[name])
    found, wanted = (grouped.actual(each, inputs, moa) for each in (other, one))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(name, found[name], value, 1e-2)


@pytest.mark.parametrize("scope", ["layer", "expert"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_at_all(kind: str, scope: str) -> None:
    """As on a rank none of whose experts is chosen: gradients are zeros, not absent or NaN."""
    _check_without_tokens(kind, scope)


@engine
@pytest.mark.parametrize("recipe", grouped.recipes())
def test_fp8_takes_no_tokens_at_all(recipe: str) -> None:
    _check_without_tokens("engine", "expert", recipe)


def _check_without_tokens(kind: str, scope: str, recipe: str | None = None) -> None:
    shape = dataclasses.replace(SHAPE, rows=0)
    inputs = grouped.make_inputs(shape, CUDA, [0] * shape.experts)
    experts = grouped.build(kind, shape, _settings(scope=scope), CUDA, recipe)
    errors = grouped.check(experts, shape, inputs, recipe)
    assert not any(errors.values()), errors


@engine
@pytest.mark.parametrize("recipe", grouped.recipes())
@pytest.mark.parametrize("variant", ["one", "bi", "qd"])
def test_fp8_pads_every_expert_and_stays_near(variant: str, recipe: str) -> None:
    inputs = grouped.make_inputs(SHAPE, CUDA, LOADS)
    experts = grouped.build("engine", SHAPE, _settings(variant), CUDA, recipe)
    errors = grouped.check(experts, SHAPE, inputs, recipe)
    print(errors)
    # bfloat16 gives 4e-3, two products of four-bit fractions about 5e-2.
    assert errors["output"] > 1e-2, "nothing was rounded to eight bits"


@engine
@pytest.mark.parametrize("scope", ["layer", "expert"])
@pytest.mark.parametrize("recipe", grouped.recipes())
def test_gates_are_not_quantised(recipe: str, scope: str) -> None:
    from megatron.core.fp8_utils import get_fp8_context

    inputs = grouped.make_inputs(SHAPE, CUDA, LOADS)
    experts = grouped.build("engine", SHAPE, _settings(scope=scope), CUDA, recipe)
    words: dict[str, Any] = {"routed": True}
    if scope == "expert":
        words = {"tokens_per_expert": LOADS}
    plain = experts.gate_in_use(inputs.x, **words)
    with get_fp8_context(experts.config):
        assert torch.equal(experts.gate_in_use(inputs.x, **words), plain)


@engine
@pytest.mark.parametrize("scope", ["layer", "expert"])
def test_keeps_little_more_than_fixed_experts(scope: str) -> None:
    """For a layer of the 2 B model: the logits, 56 bytes of the 8 kB that a token costs."""
    shape = grouped.Shape("bf16", 4096, 1280, 896, 8)
    inputs = grouped.make_inputs(shape, CUDA)
    kept = [
        saved_bytes(grouped.whole(grouped.build("engine", shape, moa, CUDA), inputs))
        for moa in (None, _settings("bi", scope))
    ]
    print(f"fixed {kept[0] / 2**20:.1f} MiB, MoA {kept[1] / 2**20:.1f} MiB")
    assert kept[1] <= 1.03 * kept[0]
