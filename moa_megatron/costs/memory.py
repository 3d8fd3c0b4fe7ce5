"""Bytes on one rank: weights, gradients, optimiser state, activations, and stated margins.

Weights and gradients are Megatron's data-parallel buffers, padding included
(``megatron.core.optimizer.param_layout``, ``distrib_optimizer``, ``layer_wise_optimizer``), for
one bucket per buffer; overlapped gradient reduction cuts more, each padded by less than
128 x ranks numbers. Held against what ranks really allocate (tests/parallel/test_costs_states.py).
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass

from moa_megatron.config import MoAConfig
from moa_megatron.costs.activations import (
    ENGINE,
    IMBALANCE,
    Activations,
    Modules,
    activations,
    number_bytes,
)
from moa_megatron.costs.parameters import Weight, weights
from moa_megatron.layout import Layout

FRAGMENTATION = 0.08
"""Assumed: share of the tensors' bytes that the caching allocator cannot use."""
CONTEXT = 3e9
"""Assumed: CUDA context, NCCL's and cuBLAS's buffers on each GPU, bytes."""
_PARAMETER, _BUCKET = 64, 128
_ADAM, _MOMENTUM, _MASTER = 8, 4, 4


@dataclass(frozen=True)
class States:
    """Bytes that last: weights, their gradients, state of the optimiser with master weights."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most, which is on pipeline stage ``stage``."""

    states: States
    activations: Activations
    quantised: float
    stage: int

    @property
    def tensors(self) -> float:
        """Everything that is computed, without margins."""
        return self.states.total + self.activations.total + self.quantised

    @property
    def fragmentation(self) -> float:
        """Assumed, see ``FRAGMENTATION``."""
        return FRAGMENTATION * self.tensors

    @property
    def total(self) -> float:
        """What the GPU must have."""
        return self.tensors + self.fragmentation + CONTEXT


def memory(
    args: argparse.Namespace,
    moa: MoAConfig,
    layout: Layout,
    modules: Modules = ENGINE,
    imbalance: float = IMBALANCE,
) -> Memory:
    """The fullest rank of a layout.

    Args:
        args: Megatron's namespace, with ``padded_vocab_size``, batch sizes and recomputation.
        moa: settings of the method.
        layout: sizes of the parallel dimensions.
        modules: what computes the layers.
        imbalance: tokens on the busiest expert-parallel rank, relative to an even spread.
    """
    count = args.global_batch_size // (args.micro_batch_size * layout.dp)
    ranks = []
    for stage in range(layout.pp):
        mine = weights(args, moa, args.padded_vocab_size, layout, stage)
        acts = activations(args, moa, layout, stage, count, modules, imbalance)
        fp8 = 2.0 * sum(w.numel * w.copies for w in mine if w.matrix) if args.fp8 else 0.0
        ranks.append(Memory(states(args, layout, mine), acts, fp8, stage))
    return max(ranks, key=lambda rank: rank.total)


def states(args: argparse.Namespace, layout: Layout, rank: list[Weight]) -> States:
    """Bytes of weights, gradients and optimiser state of a rank with these weights.

    Adam keeps two float32 numbers for each parameter, Muon one for each matrix; 16-bit weights
    have a float32 master besides. ``--use-distributed-optimizer`` cuts this state into equal
    parts, and with Muon gives each rank whole matrices, the rest being cut as with Adam; without
    it every rank holds all.

    Raises:
        ValueError: for an optimiser other than adam, sgd and muon.
    """
    if args.optimizer not in ("adam", "sgd", "muon"):
        raise ValueError(f"--optimizer {args.optimizer}: memory is known for adam, sgd and muon")
    size, gradient = number_bytes(args), 4
    if size == 2 and (args.grad_reduce_in_bf16 or args.fp16):
        gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else 2
    master = _MASTER if size == 2 else 0
    scalar = _ADAM if args.optimizer != "sgd" else (_MOMENTUM if args.sgd_momentum else 0)
    buffers = optimizer = 0
    for expert in (False, True):
        ranks = layout.expert_ranks if expert else layout.dense_ranks
        for matrix in (False, True):
            mine = [w for w in rank if w.expert is expert and w.matrix is matrix]
            if args.optimizer != "muon":
                # One buffer for both.
                mine = [w for w in rank if w.expert is expert] if matrix else []
            if not mine:
                continue
            state = master + (_MOMENTUM if matrix and args.optimizer == "muon" else scalar)
            whole = matrix and args.optimizer == "muon"
            stored, held = _buffer(args, mine, ranks, whole)
            buffers += stored
            optimizer += held * state
    return States(buffers * size, buffers * gradient, optimizer)


def _buffer(
    args: argparse.Namespace, mine: list[Weight], ranks: int, whole: bool
) -> tuple[int, int]:
    """Numbers in a buffer of all ``mine``, and those that one rank's optimiser holds at most."""
    # Megatron's validation replaces the first by the second where the optimiser is Muon.
    layer_wise = getattr(args, "use_layer_wise_distributed_optimizer", False)
    if not (args.use_distributed_optimizer or layer_wise):
        total = sum(w.numel * w.copies for w in mine)
        return total, total
    if whole:
        return _whole_matrices(mine, ranks)
    padded = sum(_ceil(w.numel, _PARAMETER) * w.copies for w in mine)
    stored = _ceil(padded, math.lcm(ranks, _BUCKET))
    return stored, min(stored // ranks, sum(w.numel * w.copies for w in mine))


def _whole_matrices(mine: Iterable[Weight], ranks: int) -> tuple[int, int]:
    """Greedy packing as in Megatron's layer-wise optimiser: largest first, to the emptiest."""
    sizes = sorted((w.numel for w in mine for _ in range(w.copies)), reverse=True)
    loads = [(0, 0)] * ranks  # padded end, numbers held
    for numel in sizes:
        end, held = heapq.heappop(loads)
        heapq.heappush(loads, (_ceil(end, _PARAMETER) + numel, held + numel))
    bucket = math.lcm(ranks, _BUCKET)
    shard = _ceil(max(end for end, _ in loads), math.lcm(_PARAMETER, bucket // ranks))
    return shard * ranks, max(held for _, held in loads)


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
