"""Every layout trains as one rank does: losses, every gradient, weights after two steps.

Not the full product of layouts and settings: every layout meets token gates and learned
coefficients, and in MoE models both gate scopes; every variant meets every dense layout.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

import pytest

from moa_megatron.config import MoAConfig
from tests.helpers.cases import Layout, Model, moa
from tests.helpers.parity import Bench

COMMON = {
    "cp2": Layout(cp=2),
    "pp2": Layout(pp=2),
    "vpp2": Layout(pp=2, vpp=2),
    "dp2_sharded": Layout(data=2, sharded_optimizer=True),
}
DENSE = {
    "tp2": Layout(tp=2),
    "tp2_sp": Layout(tp=2, sp=True),
    **COMMON,
    "tp2_sp_cp2": Layout(tp=2, sp=True, cp=2),
}
# Megatron trains MoE layers with tensor parallelism only where sequence parallelism is on.
MOE = {
    "tp2_sp_etp2": Layout(tp=2, sp=True, etp=2),
    "tp2_sp_etp1": Layout(tp=2, sp=True, etp=1),
    "tp2_sp_ep2_etp1": Layout(tp=2, sp=True, ep=2, etp=1),
    "ep2": Layout(ep=2, data=2),
    "ep2_etp2": Layout(tp=2, sp=True, ep=2, etp=2, data=2),
    "ep2_cp2": Layout(ep=2, cp=2),
    **COMMON,
    "pp2_ep2_sharded": Layout(pp=2, ep=2, data=2, sharded_optimizer=True),
}
SCOPES: tuple[Literal["layer", "expert"], ...] = ("layer", "expert")
VARIANTS = {
    "one": moa(variant="one"),
    "bi": moa(variant="bi"),
    "qd": moa(variant="qd"),
    "la": moa(mixing="la", variant="bi"),
}


def _case(
    family: Literal["hybrid", "gpt"], moe: bool, settings: str, choice: MoAConfig, layout: str
) -> object:
    place = (MOE if moe else DENSE)[layout]
    model = Model(
        family=family,
        moe=moe,
        moa=choice,
        # Megatron shards the state of Adam only.
        optimizer="adam" if place.sharded_optimizer else "sgd",
    )
    kind = "moe" if moe else "dense"
    # `make test` keeps every layout, both scopes, and gates as well as learned coefficients.
    spared = family == "gpt" or settings in ("one", "qd", "la_expert")
    marks = [pytest.mark.slow] if spared else []
    return pytest.param(model, place, id=f"{family}-{kind}-{settings}-{layout}", marks=marks)


def _cases() -> list[object]:
    cases = []
    for name, choice in VARIANTS.items():
        cases += [_case("hybrid", False, name, choice, layout) for layout in DENSE]
    cases.append(_case("hybrid", False, "type1", moa(variant="type1"), "tp2_sp"))
    turns = itertools.cycle(VARIANTS.items())
    cases += [_case("gpt", False, *next(turns), layout) for layout in DENSE]

    gated = itertools.cycle(list(VARIANTS.items())[:-1])
    for scope, layout in itertools.product(SCOPES, MOE):
        for name, choice in (next(gated), ("la", VARIANTS["la"])):
            scoped = dataclasses.replace(choice, gate_scope=scope)
            cases.append(_case("hybrid", True, f"{name}_{scope}", scoped, layout))
    mixed = itertools.cycle(itertools.product(VARIANTS.items(), SCOPES))
    for layout in MOE:
        (name, choice), scope = next(mixed)
        scoped = dataclasses.replace(choice, gate_scope=scope)
        cases.append(_case("gpt", True, f"{name}_{scope}", scoped, layout))
    return cases


@pytest.mark.parametrize(("model", "layout"), _cases())
def test_equals_one_rank(bench: Bench, model: Model, layout: Layout) -> None:
    bench.parity(model, layout).check()
