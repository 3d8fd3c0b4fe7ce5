"""The comparison itself: it must find a small change in any one tensor of any kind."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest

from tests.helpers.cases import Model
from tests.helpers.parity import BOUND, Bench, compare
from tests.helpers.tensors import Array, Shard, assemble, relative_error

CHANGES: dict[str, Callable[[Array], Array]] = {
    "zeroed": np.zeros_like,
    "flipped": np.negative,
    "doubled": lambda array: 2 * array,
    "slightly_off": lambda array: array * (1 + 3 * BOUND),
    "nan": lambda array: np.full_like(array, np.nan),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["gradients", "weights"])
def test_finds_a_change_in_any_tensor(bench: Bench, kind: str, change: str) -> None:
    reference = bench.reference(Model())
    compare(reference, reference).check(bound=0.0)
    for key, tensor in getattr(reference, kind).items():
        changed = copy.deepcopy(reference)
        getattr(changed, kind)[key] = CHANGES[change](tensor)
        with pytest.raises(AssertionError, match="differs by more than"):
            compare(changed, reference).check()


def test_finds_a_change_in_loss_and_norm(bench: Bench) -> None:
    reference = bench.reference(Model())
    for kind in ("losses", "norms"):
        for value in (reference.losses[0] * (1 + 3 * BOUND), float("nan")):
            changed = copy.deepcopy(reference)
            getattr(changed, kind)[-1] = value
            with pytest.raises(AssertionError, match="differs by more than"):
                compare(changed, reference).check()


def test_shards_must_cover_and_agree() -> None:
    left, right, wrong = np.ones((2, 3)), np.zeros((2, 3)), np.full((2, 3), 1 + 1e-15)

    def shard(first: int, data: Array) -> Shard:
        return Shard("w", (2, 6), (slice(0, 2), slice(first, first + 3)), data)

    whole, conflicts = assemble([shard(0, left), shard(3, right), shard(0, left)])
    assert whole["w"].sum() == 6 and not conflicts
    assert assemble([shard(0, left), shard(3, right), shard(0, wrong)])[1] == ["w"]
    with pytest.raises(AssertionError, match="no rank holds all"):
        assemble([shard(3, right)])


def test_zero_reference() -> None:
    zero = np.zeros(3)
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero + 1e-30, zero) == float("inf")
