"""Shared experts beside the dispatcher's communication: the same numbers as after one another.

``--moe-shared-expert-overlap`` lets the dispatcher call the shared experts' stages.
"""

from __future__ import annotations

import dataclasses

import pytest

from tests.helpers.cases import Layout, Model, moa
from tests.helpers.parity import BOUND, Bench, compare

LAYER = Model(moe=True, moa=moa(variant="qd"))
EXPERT = Model(moe=True, moa=moa(gate_scope="expert"))
WEIGHTED = dataclasses.replace(LAYER, options=(("moe_shared_expert_gate", True),))
LA = Model(moe=True, moa=moa(mixing="la"))
TYPE1 = Model(family="gpt", moe=True, moa=moa(variant="type1"))
EP2 = Layout(ep=2, data=2)
SP_EP2 = Layout(tp=2, sp=True, ep=2, etp=1)
SP = Layout(tp=2, sp=True)
CASES = {
    "layer-ep2": (LAYER, EP2),
    "layer-sp_ep2_etp1": (LAYER, SP_EP2),
    "weighted-sp": (WEIGHTED, SP),
    "expert-sp": (EXPERT, SP),
    "la-sp": (LA, SP),
    "gpt-type1-sp_ep2_etp1": (TYPE1, SP_EP2),
}


def overlapped(model: Model, **more: object) -> Model:
    options = {"moe_shared_expert_overlap": True, **more}
    return dataclasses.replace(model, options=(*model.options, *options.items()))


@pytest.mark.parametrize(("model", "layout"), CASES.values(), ids=CASES)
def test_overlap_changes_nothing(bench: Bench, model: Model, layout: Layout) -> None:
    reference = bench.reference(model)
    found = bench.train(overlapped(model), layout, initial=reference.initial)
    compare(found, reference).check()


def test_recomputed_as_part_of_the_layer(bench: Bench) -> None:
    recompute = {"recompute_granularity": "selective", "recompute_modules": ("moe",)}
    kinds = (overlapped(EXPERT), overlapped(EXPERT, **recompute))
    initial = bench.reference(EXPERT).initial
    plain, found = (bench.train(kind, EP2, initial=initial) for kind in kinds)
    compare(found, plain).check(bound=0.0)
    assert found.gate_calls > plain.gate_calls


@pytest.mark.parametrize("mutation", ["gather_without_sum", "shared_stages_without_gate"])
def test_wrong_coefficients_are_seen(bench: Bench, mutation: str) -> None:
    initial = bench.reference(EXPERT).initial
    wrong = bench.train(overlapped(EXPERT), SP, initial=initial, mutation=mutation)
    found = compare(wrong, bench.reference(EXPERT))
    assert max(found.of_gates().values()) > 1000 * BOUND
