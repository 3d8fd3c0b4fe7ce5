"""Activation recomputation changes neither losses nor any gradient, the gates' included."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.helpers.cases import ONE_RANK, Layout, Model, moa
from tests.helpers.parity import Bench, compare

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": modules}


DENSE = Model()
DENSE_GPT = Model(family="gpt", moa=moa(variant="qd"))
MOE = Model(moe=True)
MOE_GPT = Model(family="gpt", moe=True, moa=moa(gate_scope="expert"))
# These two cut the graph inside a feedforward block, and the gradients of its input are added up
# in another order; all others repeat the same operations and must agree in every bit.
REORDERED = {"layernorm", "shared_experts"}
ROUNDING = 1e-6
TP2_SP = Layout(tp=2, sp=True)
EP2 = Layout(ep=2, data=2)

CASES: dict[str, tuple[Model, dict[str, Any], Layout]] = {
    "hybrid-dense-full-1": (DENSE, FULL, ONE_RANK),
    "hybrid-dense-full-tp2_sp": (DENSE, FULL, TP2_SP),
    "gpt-dense-full-1": (DENSE_GPT, FULL, ONE_RANK),
    "gpt-dense-mlp-1": (DENSE_GPT, selective("mlp"), ONE_RANK),
    "gpt-dense-mlp-tp2_sp": (DENSE_GPT, selective("mlp"), TP2_SP),
    "gpt-dense-layernorm-1": (DENSE_GPT, selective("layernorm"), ONE_RANK),
    "hybrid-dense-layernorm-1": (DENSE, selective("layernorm"), ONE_RANK),
    "hybrid-dense-mlp-1": (DENSE, selective("mlp"), ONE_RANK),
    "hybrid-moe-full-ep2": (MOE, FULL, EP2),
    "hybrid-moe-moe-1": (MOE, selective("moe"), ONE_RANK),
    "gpt-moe-moe-ep2": (MOE_GPT, selective("moe"), EP2),
    "gpt-moe-shared_experts-1": (MOE_GPT, selective("shared_experts"), ONE_RANK),
    "gpt-moe-layernorm-tp2_sp": (MOE_GPT, selective("layernorm"), TP2_SP),
}


@pytest.mark.parametrize(("model", "options", "layout"), CASES.values(), ids=CASES)
def test_equals_no_recompute(
    bench: Bench, model: Model, options: dict[str, Any], layout: Layout
) -> None:
    reference = bench.reference(model)
    recomputing = dataclasses.replace(model, options=tuple(options.items()))
    plain = bench.train(model, layout, initial=reference.initial)
    found = bench.train(recomputing, layout, initial=reference.initial)
    parity = compare(found, plain)
    print(parity.summary())
    modules = set(options.get("recompute_modules", ()))
    parity.check(bound=ROUNDING if modules & REORDERED else 0.0)
    # The norm's output is recomputed from its input; the gate that reads it is not.
    recomputes_gates = modules != {"layernorm"}
    assert (found.gate_calls > plain.gate_calls) == recomputes_gates
