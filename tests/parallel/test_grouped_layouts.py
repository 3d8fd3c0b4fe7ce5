"""Grouped experts train as sequential ones do on one rank, at every layout, and back.

Sequential experts are compared with themselves in test_layouts.py; here they are the reference.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.cases import ONE_RANK, Layout, Model, moa
from tests.helpers.parity import Bench, Parity, compare

EP2 = Layout(ep=2, data=2)
ETP2, ETP1 = Layout(tp=2, sp=True, etp=2), Layout(tp=2, sp=True, etp=1)
EP2_ETP1 = Layout(tp=2, sp=True, ep=2, etp=1)
EP2_ETP2 = Layout(tp=2, sp=True, ep=2, etp=2, data=2)
SHARDED = Layout(pp=2, ep=2, data=2, sharded_optimizer=True)

LAYER = Model(moe=True, moa=moa(variant="qd"))
LAYER_LA = Model(moe=True, moa=moa(mixing="la"))
EXPERT = Model(moe=True, moa=moa(gate_scope="expert"))
EXPERT_ADAM = dataclasses.replace(EXPERT, optimizer="adam")
EXPERT_LA = Model(moe=True, moa=moa(gate_scope="expert", mixing="la"))
EXPERT_GPT = Model(family="gpt", moe=True, moa=moa(gate_scope="expert", gate="softmax"))
TYPE1 = Model(moe=True, moa=moa(gate_scope="expert", variant="type1"))


def grouped(model: Model, **options: Any) -> Model:
    """The same model on grouped experts."""
    options = {"moe_grouped_gemm": True, **options}
    return dataclasses.replace(model, options=(*model.options, *options.items()))


def parity(bench: Bench, model: Model, layout: Layout, mutation: str | None = None) -> Parity:
    """Grouped experts at ``layout`` against sequential ones on one rank, from the same weights."""
    reference = bench.reference(model)
    run = bench.train(grouped(model), layout, initial=reference.initial, mutation=mutation)
    found = compare(run, reference)
    print(found.summary())
    return found


CASES = {
    "hybrid-layer-1": (LAYER, ONE_RANK),
    "hybrid-layer-ep2_etp2": (LAYER, EP2_ETP2),
    "hybrid-layer-la-etp2": (LAYER_LA, ETP2),
    "hybrid-expert-ep2": (EXPERT, EP2),
    "hybrid-expert-etp2": (EXPERT, ETP2),
    "hybrid-expert-etp1": (EXPERT, ETP1),
    "hybrid-expert-ep2_etp1": (EXPERT, EP2_ETP1),
    "hybrid-expert-ep2_etp2": (EXPERT, EP2_ETP2),
    "hybrid-expert-pp2_ep2_sharded": (EXPERT_ADAM, SHARDED),
    "hybrid-expert-la-etp2": (EXPERT_LA, ETP2),
    "hybrid-expert-la-ep2_etp1": (EXPERT_LA, EP2_ETP1),
    "hybrid-expert-type1-etp2": (TYPE1, ETP2),
    "gpt-expert-softmax-ep2_etp2": (EXPERT_GPT, EP2_ETP2),
}


# `make test` keeps both scopes, gates and learned coefficients, EP and both kinds of expert TP.
QUICK = {
    "hybrid-layer-ep2_etp2",
    "hybrid-expert-ep2",
    "hybrid-expert-etp2",
    "hybrid-expert-etp1",
    "hybrid-expert-la-etp2",
    "moe_act-expert",
    "sequential-ep2-grouped-etp2-sequential-ep2_etp2",
    "grouped-la-etp1-sequential-ep2-grouped-1",
}


def _parameters(cases: dict[str, Any]) -> list[Any]:
    return [
        pytest.param(*case, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, case in cases.items()
    ]


@pytest.mark.parametrize(("model", "layout"), _parameters(CASES))
def test_equals_sequential_on_one_rank(bench: Bench, model: Model, layout: Layout) -> None:
    parity(bench, model, layout).check()


@pytest.mark.parametrize(
    ("mutation", "model", "layout"),
    [
        ("grouped_no_copy", EXPERT, ETP2),
        ("grouped_no_copy", EXPERT_LA, ETP2),
        ("grouped_copies_logits", EXPERT, ETP2),
        ("expert_as_ordinary", EXPERT, EP2),
        ("expert_sequence_sum", EXPERT, EP2_ETP1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_reductions_are_detected(
    bench: Bench, mutation: str, model: Model, layout: Layout
) -> None:
    found = parity(bench, model, layout, mutation)
    with pytest.raises(AssertionError, match=r"differs by more than|replicas differ"):
        found.check()
    assert found.worst()[1] > 0.1, f"too near the bound to rely on: {found.worst()}"


@pytest.mark.parametrize("layout", [EP2, ETP2], ids=["ep2", "etp2"])
@pytest.mark.parametrize("model", [LAYER, EXPERT], ids=["layer", "expert"])
def test_starts_as_sequential_does(bench: Bench, model: Model, layout: Layout) -> None:
    """Gates and, layout by layout, all other weights: the choice of experts changes no run."""
    sequential = bench.place("fresh", layout, model=model)
    found = bench.place("fresh", layout, model=grouped(model))
    assert found.keys() == sequential.keys()
    assert all(np.array_equal(found[key], sequential[key]) for key in found)


def marks_case(model: Model, layout: Layout) -> dict[str, dict[str, Any]]:
    """What Megatron reads off the experts' parameters, by the names of grouped experts."""
    from tests.helpers import models

    with models.model_parallel(layout):
        found = {}
        for name, parameter in models.build(model, layout)[0].named_parameters():
            name = re.sub(r"local_experts\.(\d+)\.(.*)", r"\2\1", name)
            plain = {k: v for k, v in vars(parameter).items() if isinstance(v, (bool, int))}
            found[name] = {**plain, "shape": tuple(parameter.shape)}
        return {name: marks for name, marks in found.items() if ".experts." in name}


@pytest.mark.parametrize("layout", [ONE_RANK, ETP2, EP2_ETP1], ids=["1", "etp2", "ep2_etp1"])
def test_parameters_are_marked_as_sequential_ones(bench: Bench, layout: Layout) -> None:
    case = "tests.parallel.test_grouped_layouts:marks_case"
    sequential = bench.pool.run(case, layout.ranks, model=EXPERT, layout=layout)
    found = bench.pool.run(case, layout.ranks, model=grouped(EXPERT), layout=layout)
    assert found == sequential
    name = "module.decoder.layers.1.mlp.experts.linear_fc1.weight3"
    assert found[0][name]["partition_stride"] == 2 and len(found[0][name]["shape"]) == 2


JOURNEYS = {
    "sequential-ep2-grouped-etp2-sequential-ep2_etp2": (
        EXPERT,
        [(EXPERT, EP2), (grouped(EXPERT), ETP2), (EXPERT, EP2_ETP2)],
    ),
    "grouped-la-etp1-sequential-ep2-grouped-1": (
        EXPERT_LA,
        [(grouped(EXPERT_LA), ETP1), (EXPERT_LA, EP2), (grouped(EXPERT_LA), ONE_RANK)],
    ),
    "sequential-gpt-1-grouped-ep2_etp2-sequential-1": (
        EXPERT_GPT,
        [(EXPERT_GPT, ONE_RANK), (grouped(EXPERT_GPT), EP2_ETP2), (EXPERT_GPT, ONE_RANK)],
    ),
    "grouped-layer-ep2-grouped-etp2": (
        LAYER,
        [(grouped(LAYER), EP2), (grouped(LAYER), ETP2)],
    ),
}


@pytest.mark.parametrize(("model", "stops"), _parameters(JOURNEYS))
def test_checkpoints_interchange(
    bench: Bench, tmp_path: Path, model: Model, stops: list[tuple[Model, Layout]]
) -> None:
    weights = bench.place("fresh", ONE_RANK, model=model)
    for step in range(len(stops) - 1):
        (writer, source), (reader, target) = stops[step], stops[step + 1]
        path = tmp_path / str(step)
        path.mkdir()
        for names in bench.pool.run(
            "tests.helpers.training:save",
            source.ranks,
            model=writer,
            layout=source,
            initial=weights,
            path=str(path),
        ):
            assert names == sorted(weights), "the checkpoint holds other tensors than the model"
        found = bench.place("restore", target, model=reader, path=str(path))
        assert found.keys() == weights.keys()
        assert all(np.array_equal(found[key], weights[key]) for key in weights)


def test_every_parameter_is_saved(bench: Bench) -> None:
    case = "tests.helpers.training:lost_in_checkpoint"
    assert bench.pool.run(case, model=grouped(EXPERT), mutation=None) == [[]]
    (lost,) = bench.pool.run(case, model=grouped(EXPERT), mutation="grouped_unsaved")
    assert lost and all("experts.moa_gate" in name for name in lost)


RECOMPUTED = {
    "moe_act-expert": (EXPERT, ("moe_act",)),
    "moe_act-layer": (LAYER, ("moe_act",)),
    "moe_act-expert-la": (EXPERT_LA, ("moe_act",)),
    "moe-expert": (EXPERT, ("moe",)),
}


@pytest.mark.parametrize(("model", "modules"), _parameters(RECOMPUTED))
def test_recomputation_changes_nothing(
    bench: Bench, model: Model, modules: tuple[str, ...]
) -> None:
    reference = bench.reference(model)
    plain = bench.train(grouped(model), EP2, initial=reference.initial)
    recomputing = grouped(model, recompute_granularity="selective", recompute_modules=modules)
    found = bench.train(recomputing, EP2, initial=reference.initial)
    compare(found, plain).check(bound=0.0)
    # The mixture alone is recomputed from its arguments, which the gates' output is one of.
    assert (found.gate_calls > plain.gate_calls) == (modules == ("moe",))
