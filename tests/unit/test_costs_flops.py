"""FLOPs against torch's own counter, and what Megatron prints as throughput."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest
import torch

from tests.helpers import isolated
from tests.unit.test_costs import prepared
from tests.unit.test_costs_memory import built


def counted(run: Any) -> tuple[int, int]:
    """FLOPs of the matrix products of a step, forward and backward, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    model, args = built(run), run.args
    tokens = torch.randint(0, 64, (args.micro_batch_size, args.seq_length))
    positions = torch.arange(args.seq_length).expand_as(tokens)
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens, positions, None, labels=tokens)
    with FlopCounterMode(display=False) as backward:
        loss.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def check_matrix_products_are_exact() -> None:
    from moa_megatron.costs import flops

    for words in (
        ("tiny-dense",),
        ("tiny-dense", "--moa-variant", "type1", "--bf16"),
        ("tiny-dense", "--moa-mixing", "fixed", "--moa-model", "gpt"),
        ("tiny-dense", "--mtp-num-layers", "1"),
        ("tiny-moe", "--moa-variant", "qd"),
        ("tiny-moe", "--moa-mixing", "la", "--moe-layer-freq", "2"),
        ("tiny-moe", "--moa-gate-scope", "expert", "--moe-router-topk", "3"),
        ("tiny-moe", "--moa-mixing", "fixed", "--set", "moe_shared_expert_intermediate_size=null"),
    ):
        run = prepared(*words, "--vocab-size", "512")
        tokens = run.args.micro_batch_size * run.args.seq_length
        expected = flops(run.args, run.moa, run.args.padded_vocab_size)
        # Local attention computes the half of the square that the mask then hides, too.
        products = tokens * (expected.forward + expected.attention - expected.mixture)
        forward, backward = counted(run)
        assert (forward, backward) == (products, 2 * products), (words, expected)


def check_mixture_is_counted_by_hand() -> None:
    from moa_megatron.costs import flops

    run = prepared("tiny-dense", "--moa-dictionary", "id", "silu", "--num-layers", "1")
    found = flops(run.args, run.moa, 512).mixture
    assert found == 344 * (2 * 2 + 2 * 4 + 1)
    run = prepared("tiny-moe", "--moa-variant", "qd", "--num-layers", "1")
    assert flops(run.args, run.moa, 512).mixture == (344 + 2 * 84) * (2 * 4 + 3 * 10)
    fixed = prepared("tiny-moe", "--moa-mixing", "fixed")
    assert flops(fixed.args, fixed.moa, 512).mixture == 0


def megatrons(args: argparse.Namespace) -> float:
    """What Megatron counts for a token of a step of one sequence."""
    from megatron.training import training

    return float(training.num_floating_point_operations(args, 1)) / args.seq_length


def check_throughput_counts_all_of_the_model() -> None:
    from moa_megatron import patches
    from moa_megatron.costs import flops

    for words in (
        ("dense-0.12b",),
        ("moe-2b",),
        ("moe-2b", "--moa-mixing", "fixed"),
        ("moe-2b", "--moa-model", "gpt", "--moe-layer-freq", "3"),
        ("dense-0.12b", "--mtp-num-layers", "1"),
        ("dense-0.12b", "--hybrid-layer-pattern", "*-*-**-", "--set", "num_layers=null"),
        ("tiny-moe", "--moa-mixing", "la", "--vocab-size", "512"),
    ):
        run = prepared(*words)
        expected = flops(run.args, run.moa, run.args.padded_vocab_size)
        assert megatrons(run.args) == pytest.approx(expected.model, rel=1e-12), words
        if run.moa.mixing == "fixed":
            continue
        assert patches.undo(["throughput"]) == ["throughput"]
        try:
            mended = dataclasses.replace(expected, gates=0, mixture=0, prediction=0)
            assert megatrons(run.args) == pytest.approx(mended.model, rel=1e-12), words
        finally:
            assert patches.apply(["throughput"]) == ["throughput"]


def check_fixed_is_megatrons_own_number() -> None:
    from moa_megatron import patches

    for words in (("dense-0.12b",), ("moe-2b",), ("moe-2b", "--moa-model", "gpt")):
        args = prepared(*words, "--moa-mixing", "fixed").args
        ours = megatrons(args)
        patches.undo(["throughput"])
        try:
            assert megatrons(args) == ours
        finally:
            patches.apply(["throughput"])
        bare = argparse.Namespace(**{k: v for k, v in vars(args).items() if "moa_" not in k})
        assert megatrons(bare) == ours


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_flops(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
