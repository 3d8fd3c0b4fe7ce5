"""MoE router options with gates, under expert parallelism.

A microbatch is one whole sequence, with EP 2 as on one rank. Router losses and token dropping act
within a microbatch, so all of these are independent of this layout and must equal one rank: also
with a capacity, which would differ where a sequence is split.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers.cases import Layout, Model, moa
from tests.helpers.parity import Bench, compare
from tests.helpers.tensors import relative_errors

EP2 = Layout(ep=2, data=2)
EP2_ETP2 = Layout(tp=2, sp=True, ep=2, etp=2, data=2)
CAPACITY = {"moe_expert_capacity_factor": 0.75, "moe_token_drop_policy": "probs"}
AUX_LOSS = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.05}
OPTIONS: dict[str, dict[str, Any]] = {
    "aux_loss": AUX_LOSS,
    "seq_aux_loss": {**AUX_LOSS, "moe_router_load_balancing_type": "seq_aux_loss"},
    "z_loss": {"moe_z_loss_coeff": 0.05},
    "aux_free_sigmoid": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.1,
    },
    "capacity": CAPACITY,
    "capacity_padded": {**CAPACITY, "moe_pad_expert_input_to_capacity": True},
}


def _model(scope: str, options: dict[str, Any]) -> Model:
    return Model(moe=True, moa=moa(gate_scope=scope), options=tuple(options.items()))


@pytest.mark.parametrize("scope", ["layer", "expert"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_one_rank(bench: Bench, options: dict[str, Any], scope: str) -> None:
    model = _model(scope, options)
    plain, optional = bench.reference(_model(scope, {})), bench.reference(model)
    assert np.isfinite(optional.losses).all()
    changed = relative_errors(
        *({k: r.gradients[k] for k in plain.gradients} for r in (optional, plain))
    )
    assert max(changed.values()) > 1e-3, "the option must have had an effect"
    bench.parity(model, EP2).check()


@pytest.mark.parametrize("scope", ["layer", "expert"])
def test_router_losses_with_split_sequences(bench: Bench, scope: str) -> None:
    """Upstream sums the router's statistics over a split sequence: equal there too."""
    bench.parity(_model(scope, AUX_LOSS | {"moe_z_loss_coeff": 0.05}), EP2_ETP2).check()


def test_padding_changes_nothing_but_shapes(bench: Bench) -> None:
    """Padding rows carry zero weight: they must not reach a gate's gradient."""
    for scope in ("layer", "expert"):
        dropped, padded = (
            bench.reference(_model(scope, OPTIONS[name]))
            for name in ("capacity", "capacity_padded")
        )
        compare(padded, dropped).check()
