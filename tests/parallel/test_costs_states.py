"""Predicted bytes of weights, gradients and optimiser against what ranks allocate."""

from __future__ import annotations

import pytest

from moa_megatron.layout import Layout
from tests.helpers.parity import Bench

ADAM = ["tiny-moe"]
MUON = ["tiny-moe", "--optimizer", "muon", "--muon-tp-mode", "duplicated"]
SHARDED = ["--use-distributed-optimizer"]
BF16 = ["--bf16"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
EP2 = ["--expert-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]

CASES: dict[str, tuple[list[str], Layout]] = {
    "adam-fp32": (ADAM, Layout(dp=2)),
    "adam-bf16-tp2": ([*ADAM, *BF16, *TP2], Layout(tp=2, etp=2)),
    "adam-bf16-sharded": ([*ADAM, *BF16, *SHARDED], Layout(dp=2)),
    "adam-fp32-sharded": ([*ADAM, *SHARDED], Layout(dp=2)),
    "adam-bf16-sharded-ep2": ([*ADAM, *BF16, *SHARDED, *EP2], Layout(dp=4, ep=2)),
    "adam-bf16-sharded-pp2": ([*ADAM, *BF16, *SHARDED, *PP2], Layout(pp=2, dp=2)),
    "adam-bf16-bf16-gradients": ([*ADAM, *BF16, "--grad-reduce-in-bf16"], Layout(dp=2)),
    "muon-bf16": ([*MUON, *BF16], Layout(dp=2)),
    "muon-bf16-ep2": ([*MUON, *BF16, *EP2], Layout(dp=2, ep=2)),
    "muon-bf16-sharded": ([*MUON, *BF16, *SHARDED], Layout(dp=2)),
    "muon-bf16-sharded-ep2": ([*MUON, *BF16, *SHARDED, *EP2], Layout(dp=4, ep=2)),
}
# Parts of a layout hold the same bytes up to the padding behind the last tensor of a buffer, and
# whole matrices do not divide evenly: the prediction is of the fullest rank.


QUICK = ("adam-bf16-sharded-ep2", "muon-bf16-sharded-ep2")


@pytest.mark.parametrize(
    ("words", "layout"),
    [
        pytest.param(*case, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, case in CASES.items()
    ],
)
def test_fullest_rank(bench: Bench, words: list[str], layout: Layout) -> None:
    ranks = bench.pool.run(
        "tests.helpers.states:allocated_and_predicted",
        layout.world_size,
        words=words,
        layout=layout,
    )
    for name, part in (("weights", 0), ("gradients", 1), ("optimizer", 2)):
        found = max(allocated[part] for allocated, _ in ranks)
        expected = max(predicted[part] for _, predicted in ranks)
        print(f"{name}: {found:,} allocated, {expected:,} predicted")
        assert found == expected, name
