"""The masked autoencoder: what plain PyTorch computes, at every layout."""

from typing import Any

import pytest

from moa_megatron.config import MoAConfig
from tests.helpers.cases import MAE_OPTIONS, Layout, Model, moa
from tests.helpers.parity import Bench

VARIANTS = {
    "fixed": MoAConfig(mixing="fixed"),
    "la": moa(mixing="la", variant="bi"),
    "one": moa(variant="one"),
    "bi": moa(variant="bi"),
    "qd": moa(variant="qd"),
    "type1": moa(variant="type1"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_equal_plain_pytorch(bench: Bench, name: str) -> None:
    (errors,) = bench.pool.run("tests.helpers.mae_parity:errors_against_plain", moa=VARIANTS[name])
    # Sums over tokens in another order, in float64.
    assert max(errors.values()) < 1e-11, {k: e for k, e in errors.items() if e >= 1e-11}
    assert any("coefficients" in key for key in errors) == (name != "fixed")


@pytest.mark.parametrize("mutation", ["masks", "positions"])
def test_the_comparison_bites(bench: Bench, mutation: str) -> None:
    (errors,) = bench.pool.run(
        "tests.helpers.mae_parity:errors_against_plain", moa=VARIANTS["qd"], mutation=mutation
    )
    assert errors["loss"] > 1e-4


@pytest.mark.parametrize(
    ("name", "layout", "optimizer"),
    [
        ("qd", Layout(tp=2), "sgd"),
        ("qd", Layout(data=2), "sgd"),
        ("qd", Layout(tp=2, data=2, sharded_optimizer=True), "adam"),
        ("fixed", Layout(tp=2), "sgd"),
        ("la", Layout(tp=2), "sgd"),
        ("one", Layout(tp=2, data=2), "sgd"),
        ("bi", Layout(tp=2), "sgd"),
    ],
)
def test_layouts_equal_one_rank(bench: Bench, name: str, layout: Layout, optimizer: Any) -> None:
    case = Model(family="mae", moa=VARIANTS[name], options=MAE_OPTIONS, optimizer=optimizer)
    bench.parity(case, layout).check()
