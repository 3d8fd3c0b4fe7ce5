"""Muon makes the same update at every layout, with W1 and W2 as matrices of their own.

The update itself is held against its formula in tests/unit/test_muon.py.
"""

import pytest

from tests.helpers.cases import Layout, Model, moa
from tests.helpers.parity import Bench

DENSE = Model(optimizer="muon")
MOE = Model(moe=True, moa=moa(variant="qd", gate_scope="expert"), optimizer="muon")


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(DENSE, Layout(tp=2, sp=True), id="dense-tp2_sp"),
        pytest.param(DENSE, Layout(data=2), id="dense-dp2"),
        pytest.param(MOE, Layout(tp=2, sp=True, etp=2), id="moe-tp2_sp_etp2"),
        pytest.param(MOE, Layout(ep=2, data=2), id="moe-ep2"),
    ],
)
def test_muon_equals_one_rank(bench: Bench, model: Model, layout: Layout) -> None:
    # Newton-Schulz multiplies rounding errors of nearly equal singular values.
    bench.parity(model, layout).check(bound=1e-4)
