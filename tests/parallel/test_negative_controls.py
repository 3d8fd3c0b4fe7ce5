"""Known wrong reductions must be found by the comparison that passes the right ones.

All of them train without complaint, and most move the loss by less than 1e-5 of it: which is why
gradients are compared, one by one. The right gates pass at these places in test_layouts.py.
"""

from __future__ import annotations

import pytest

from tests.helpers.cases import Layout, Model, moa
from tests.helpers.parity import Bench

DENSE = Model()
DENSE_LA = Model(moa=moa(mixing="la"))
LAYER = Model(moe=True)
LAYER_LA = Model(moe=True, moa=moa(mixing="la"))
EXPERT = Model(moe=True, moa=moa(gate_scope="expert"))
EXPERT_LA = Model(moe=True, moa=moa(gate_scope="expert", mixing="la"))

TP2 = Layout(tp=2)
TP2_SP = Layout(tp=2, sp=True)
ETP2 = Layout(tp=2, sp=True, etp=2)
ETP1 = Layout(tp=2, sp=True, etp=1)
ETP1_EP2 = Layout(tp=2, sp=True, ep=2, etp=1)
EP2 = Layout(ep=2, data=2)
# The worst error of a control must stand far above the bound, not just outside it.
CLEAR = 0.1

CONTROLS = [
    ("no_copy", DENSE, TP2),
    ("no_copy", DENSE_LA, TP2),
    ("no_copy", DENSE_LA, TP2_SP),
    ("gather_without_sum", DENSE, TP2_SP),
    ("dense_no_sequence_sum", DENSE, TP2_SP),
    ("dense_average", DENSE, TP2_SP),
    ("dense_sequence_sum", DENSE_LA, TP2_SP),
    ("no_copy", EXPERT, ETP2),
    ("no_copy", EXPERT_LA, ETP2),
    ("expert_copies_logits", EXPERT, ETP2),
    ("expert_sequence_sum", EXPERT, ETP1_EP2),
    ("expert_sequence_sum", EXPERT, ETP2),
    ("expert_as_ordinary", EXPERT, EP2),
    ("layer_no_sequence_sum", LAYER, ETP2),
    ("layer_no_sequence_sum", LAYER_LA, ETP1),
    ("layer_average", LAYER, ETP2),
    ("layer_as_expert", LAYER, EP2),
    ("layer_copies_routed_logits", LAYER, ETP2),
    ("layer_copies_scalars", LAYER_LA, ETP2),
]


def _label(control: tuple[str, Model, Layout]) -> str:
    mutation, model, layout = control
    place = f"{model.moa.gate_scope}" if model.moe else "dense"
    sizes = f"tp{layout.tp}{'_sp' if layout.sp else ''}_ep{layout.ep}_etp{layout.etp or layout.tp}"
    return f"{mutation}-{place}-{model.moa.mixing}-{sizes}"


@pytest.mark.parametrize(
    ("mutation", "model", "layout"), [pytest.param(*c, id=_label(c)) for c in CONTROLS]
)
def test_is_detected(bench: Bench, mutation: str, model: Model, layout: Layout) -> None:
    parity = bench.parity(model, layout, mutation=mutation)
    with pytest.raises(AssertionError, match=r"differs by more than|replicas differ"):
        parity.check()
    assert parity.worst()[1] > CLEAR, f"too near the bound to rely on: {parity.worst()}"
