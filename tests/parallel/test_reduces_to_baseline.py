"""Learned coefficients of 0 and 1 that spell Megatron's own FFN give its losses and gradients."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.cases import ONE_RANK, Layout, Model, moa
from tests.helpers.parity import Bench
from tests.helpers.tensors import Array, Tensors, relative_errors

# Factors of 0 and 1 round nothing, so on one rank every bit agrees. Layouts, and branches that
# have changed places, add up in another order.
ROUNDING = 2e-6
LAYOUTS = {
    "1": (False, ONE_RANK),
    "tp2": (False, Layout(tp=2)),
    "ep2": (True, Layout(ep=2, data=2)),
}


def _spelled(names: list[str], chosen: set[str]) -> Array:
    assert chosen <= set(names)
    return np.array([float(name in chosen) for name in names], np.float32)


def _swap_branches(tensors: Tensors) -> Tensors:
    """W1 and W2 exchanged: the dictionary of qd has the pair id(y) silu(z) only."""
    return {
        key: np.roll(tensor, tensor.shape[-2] // 2, axis=-2)
        if "linear_fc1.weight" in key
        else tensor
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("place", LAYOUTS)
@pytest.mark.parametrize(
    ("variant", "chosen"),
    [
        ("type1", {"y:gelu"}),
        ("one", {"z:id"}),
        ("bi", {"y:silu", "z:id"}),
        ("qd", {"id*silu"}),
    ],
    ids=["type1", "one", "bi", "qd"],
)
def test_equals_megatrons_ffn(bench: Bench, variant: str, chosen: set[str], place: str) -> None:
    moe, layout = LAYOUTS[place]
    baseline = bench.reference(Model(moe=moe, moa=moa(mixing="fixed", variant=variant)))
    choice = moa(mixing="la", variant=variant)
    scalars = _spelled(choice.coefficient_names(), chosen)
    model = Model(moe=moe, moa=choice)
    gates = {key: gate for key, gate in bench.reference(model).initial.items() if "moa_gate" in key}
    initial = baseline.initial | {
        key: np.broadcast_to(scalars, gate.shape).copy() for key, gate in gates.items()
    }
    swap = _swap_branches if variant == "qd" else (lambda tensors: tensors)
    # One step: the scalars' gradients join the norm by which Megatron clips all the others.
    found = bench.train(model, layout, initial=swap(initial), steps=1)
    gradients = {k: g for k, g in swap(found.gradients).items() if k not in gates}
    errors = relative_errors(gradients, baseline.gradients)
    errors["loss"] = abs(found.losses[0] / baseline.losses[0] - 1)
    print(f"worst {max(errors.items(), key=lambda item: item[1])}")
    exact = layout == ONE_RANK and variant != "qd"
    assert max(errors.values()) <= (0.0 if exact else ROUNDING)
