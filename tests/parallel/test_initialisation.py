"""Fresh gates are the same at every layout, and no two experts start from the same."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.cases import GATE_STD, ONE_RANK, Layout, Model, moa
from tests.helpers.parity import Bench
from tests.helpers.tensors import Tensors, by_module, rms

LAYOUTS = {
    "tp2_sp": Layout(tp=2, sp=True),
    "tp2_sp_etp1": Layout(tp=2, sp=True, etp=1),
    "ep2": Layout(ep=2, data=2),
    "ep4": Layout(ep=4, data=4),
    "ep2_etp2": Layout(tp=2, sp=True, ep=2, etp=2, data=2),
}


def _gates(weights: Tensors) -> Tensors:
    return {key: gate for key, gate in by_module(weights).items() if "moa_gate" in key}


@pytest.mark.parametrize("scope", ["layer", "expert"])
def test_equal_at_every_layout(bench: Bench, scope: str) -> None:
    model = Model(moe=True, moa=moa(gate_scope=scope))
    expected = _gates(bench.place("fresh", ONE_RANK, model=model))
    for name, layout in LAYOUTS.items():
        found = _gates(bench.place("fresh", layout, model=model))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in found), name


def test_experts_differ(bench: Bench) -> None:
    model = Model(moe=True, moa=moa(gate_scope="expert"))
    gates = list(_gates(bench.place("fresh", ONE_RANK, model=model)).values())
    stacked = np.concatenate([gate.reshape(1, -1) for gate in gates])
    correlation = np.corrcoef(stacked) - np.eye(len(gates))
    assert np.abs(correlation).max() < 0.25
    assert abs(rms(stacked) / GATE_STD - 1) < 0.05
