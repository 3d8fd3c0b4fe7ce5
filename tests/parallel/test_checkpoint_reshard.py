"""A checkpoint written at one layout loads at any other, without a changed bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.cases import ONE_RANK, Layout, Model, moa
from tests.helpers.parity import Bench

TP2, PP2, VPP2 = Layout(tp=2), Layout(pp=2), Layout(pp=2, vpp=2)
SHARDED = Layout(data=2, sharded_optimizer=True)
EP2, EP4 = Layout(ep=2, data=2), Layout(ep=4, data=4)
ETP2, EP2_ETP1 = Layout(tp=2, sp=True, etp=2), Layout(tp=2, sp=True, ep=2, etp=1)
EP2_ETP2 = Layout(tp=2, sp=True, ep=2, etp=2, data=2)

DENSE = Model()
DENSE_GPT_LA = Model(family="gpt", moa=moa(mixing="la"))
LAYER = Model(moe=True, moa=moa(variant="qd"))
EXPERT = Model(moe=True, moa=moa(gate_scope="expert"))
EXPERT_LA = Model(moe=True, moa=moa(gate_scope="expert", mixing="la"))
EXPERT_GPT = Model(family="gpt", moe=True, moa=moa(gate_scope="expert"))
LAYER_GPT_LA = Model(family="gpt", moe=True, moa=moa(mixing="la"))

JOURNEYS = {
    "hybrid-dense-tp2-tp1-tp2": (DENSE, [TP2, ONE_RANK, TP2]),
    "hybrid-dense-pp2-tp2-vpp2": (DENSE, [PP2, TP2, VPP2]),
    "gpt-dense-la-pp2-pp1-tp2": (DENSE_GPT_LA, [PP2, ONE_RANK, TP2]),
    "gpt-dense-la-vpp2-dp2_sharded": (DENSE_GPT_LA, [VPP2, SHARDED]),
    "hybrid-moe-layer-ep2-ep4-pp2": (LAYER, [EP2, EP4, PP2]),
    "hybrid-moe-expert-ep2-ep4-ep2_etp2": (EXPERT, [EP2, EP4, EP2_ETP2]),
    "hybrid-moe-expert-la-etp2-ep4": (EXPERT_LA, [ETP2, EP4]),
    "gpt-moe-expert-ep2_etp2-ep1-ep2_etp1": (EXPERT_GPT, [EP2_ETP2, ONE_RANK, EP2_ETP1]),
    "gpt-moe-layer-la-ep2-pp2": (LAYER_GPT_LA, [EP2, PP2]),
}


@pytest.mark.parametrize(("model", "layouts"), JOURNEYS.values(), ids=JOURNEYS)
def test_reshards_bit_equal(
    bench: Bench, tmp_path: Path, model: Model, layouts: list[Layout]
) -> None:
    weights = bench.place("fresh", ONE_RANK, model=model)
    assert any("moa_gate" in key for key in weights)
    for step, (source, target) in enumerate(itertools.pairwise(layouts)):
        path = tmp_path / str(step)
        path.mkdir()
        for names in bench.pool.run(
            "tests.helpers.training:save",
            source.ranks,
            model=model,
            layout=source,
            initial=weights,
            path=str(path),
        ):
            assert names == sorted(weights), "the checkpoint holds other tensors than the model"
        found = bench.place("restore", target, model=model, path=str(path))
        assert found.keys() == weights.keys()
        assert all(np.array_equal(found[key], weights[key]) for key in weights)
        weights = found


@pytest.mark.parametrize("model", [DENSE, LAYER, EXPERT_LA], ids=["dense", "layer", "expert"])
def test_every_parameter_is_saved(bench: Bench, model: Model) -> None:
    case = "tests.helpers.training:lost_in_checkpoint"
    assert bench.pool.run(case, model=model, mutation=None) == [[]]
    (lost,) = bench.pool.run(case, model=model, mutation="unsaved")
    assert lost and all("moa_gate" in name for name in lost), "the check must see a lost gate"
