"""Whole tensors from shards, and the one measure by which two of them are compared.

Imports no Megatron: what the pool's processes send is also read by pytest's own process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Array]


@dataclass(frozen=True)
class Shard:
    """A rank's part of the tensor ``key``, and where in it."""

    key: str
    shape: tuple[int, ...]
    place: tuple[int | slice, ...]
    data: Array


@dataclass
class Run:
    """One rank's part of a training run; losses are known to the last pipeline stage only."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    initial: list[Shard] = field(default_factory=list)
    gradients: list[Shard] = field(default_factory=list)
    weights: list[Shard] = field(default_factory=list)
    gate_calls: int = 0


def assemble(shards: Iterable[Shard]) -> tuple[Tensors, list[str]]:
    """Whole tensors by name, and the names of those whose replicas differ in any bit.

    Raises:
        AssertionError: where the shards leave a gap.
    """
    whole: Tensors = {}
    known: Tensors = {}
    conflicts = set()
    for shard in shards:
        tensor = whole.setdefault(shard.key, np.zeros(shard.shape, shard.data.dtype))
        mask = known.setdefault(shard.key, np.zeros(shard.shape, bool))
        assert tensor.shape == tuple(shard.shape), f"{shard.key}: ranks differ in shape"
        seen = np.asarray(mask[shard.place])
        if not (np.asarray(tensor[shard.place])[seen] == np.asarray(shard.data)[seen]).all():
            conflicts.add(shard.key)
        # The first rank's part stands, as in a checkpoint.
        tensor[shard.place] = np.where(seen, tensor[shard.place], shard.data)
        mask[shard.place] = True
    gaps = [key for key, mask in known.items() if not mask.all()]
    assert not gaps, f"no rank holds all of {gaps}"
    return whole, sorted(conflicts)


def by_module(tensors: Tensors) -> Tensors:
    """One tensor per layer and expert, where sharded state stacks them along leading axes."""
    split: Tensors = {}
    for key, tensor in tensors.items():
        axes = ["layer"] if re.search(r"\.layers\.(?!\d)", key) else []
        axes += ["expert"] if ".experts.experts." in key else []
        for index in np.ndindex(*tensor.shape[: len(axes)]):
            label = ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True))
            split[f"{key} [{label}]" if label else key] = tensor[index]
    return split


def rms(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) if array.size else 0.0


def relative_error(actual: Array, expected: Array) -> float:
    """RMS error over RMS reference; NaN counts as infinitely wrong."""
    error, scale = rms(actual.astype(np.float64) - expected), rms(expected)
    if error == 0.0:
        return 0.0
    return error / scale if np.isfinite(error) and scale > 0.0 else float("inf")


def relative_errors(actual: Tensors, expected: Tensors) -> dict[str, float]:
    """By layer and expert; both sides must hold the same tensors."""
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    ours, theirs = by_module(actual), by_module(expected)
    return {key: relative_error(ours[key], theirs[key]) for key in theirs}
