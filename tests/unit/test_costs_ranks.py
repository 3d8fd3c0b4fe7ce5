"""Parameters of every rank at many layouts, against models that Megatron builds there.

Megatron's fake process groups stand for the other ranks, torch's meta device for their memory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch

from tests.helpers import isolated
from tests.unit.test_costs import prepared

TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
CP = "--context-parallel-size"
EP, ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"
ONE = ("--micro-batch-size", "1")
VPP = "--num-layers-per-virtual-pipeline-stage"
SP = "--sequence-parallel"


def built_on(
    ranks: Iterable[int], world: int, *words: str
) -> tuple[Any, Any, dict[int, tuple[int, int]]]:
    """The prepared run, its layout, and by rank numbers of parameters and gates."""
    from moa_megatron.layout import Layout

    with mock.patch.dict(os.environ, {"WORLD_SIZE": str(world), "RANK": "0"}):
        run = prepared(*words)
    args = run.args
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    layout = Layout(
        tp=tp,
        pp=pp,
        vpp=args.virtual_pipeline_model_parallel_size or 1,
        cp=cp,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size or tp,
        dp=world // (tp * pp * cp),
    )
    return run, layout, {rank: _counts(run, layout, rank) for rank in ranks}


def _counts(run: Any, layout: Any, rank: int) -> tuple[int, int]:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from moa_megatron import models

    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=layout.world_size
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = models.model_config(run.args, run.moa)
    config.transformer.perform_initialization = False
    meta = torch.device("meta")
    total = gates = 0
    try:
        with meta, mock.patch("torch.cuda.current_device", lambda: meta):
            builder = config.get_builder_cls()(config)
            groups = ProcessGroupCollection.use_mpu_process_groups()
            for part in range(layout.vpp):
                chunk = builder.build_model(
                    groups,
                    pre_process=groups.pp.rank() == 0 and part == 0,
                    post_process=groups.pp.rank() == layout.pp - 1 and part == layout.vpp - 1,
                    vp_stage=part if layout.vpp > 1 else None,
                )
                for name, parameter in chunk.named_parameters():
                    total += parameter.numel()
                    gates += parameter.numel() if "moa_gate" in name else 0
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    return total, gates


def assert_ranks(world: int, *words: str, ranks: Iterable[int] | None = None) -> None:
    from moa_megatron.costs.parameters import weights

    some = range(world) if ranks is None else ranks
    run, layout, actual = built_on(some, world, *words)
    for number, found in actual.items():
        stage = number // (world // layout.pp)
        rank = weights(run.args, run.moa, run.args.padded_vocab_size, layout, stage)
        expected = (
            sum(w.numel * w.copies for w in rank),
            sum(w.numel * w.copies for w in rank if w.gate),
        )
        assert found == expected, (words, layout, number, found, expected)


def check_every_recipe_at_its_suggested_layouts() -> None:
    """The first three that the planner names for a node, as its own flags give them."""
    from moa_megatron import host

    host.install()
    from moa_megatron import planning, recipes

    for recipe in recipes.language_models():
        if recipe.startswith("tiny"):
            continue
        model = planning.read(recipe, [])
        choices, _ = planning.choices(model, planning.Cluster(8, "h100"))
        assert len(choices) >= 3, recipe
        for choice in choices[:3]:
            flags = choice.flags(model.given, model.args.micro_batch_size)
            assert_ranks(8, recipe, *flags, ranks=(0, 7))


def check_dense() -> None:
    for words in (
        ("--moa-variant", "type1", TP, "2"),
        (TP, "4", SP, "--add-qkv-bias"),
        (TP, "2", "--qk-layernorm", "--moa-model", "gpt"),
        (PP, "2", "--set", "disable_bias_linear=false"),
        (PP, "2", VPP, "1", TP, "2", SP),
        (PP, "4", "--mtp-num-layers", "1"),
        (PP, "2", "--set", "untie_embeddings_and_output_weights=false"),
        (PP, "2", "--moa-model", "gpt", "--mtp-num-layers", "1"),
        (CP, "2", "--group-query-attention", "--num-query-groups", "2", "--moa-mixing", "la"),
        (PP, "2", "--hybrid-layer-pattern", "*-*|-*-"),
    ):
        assert_ranks(4, "tiny-dense", *words, *ONE)


def check_experts() -> None:
    for words, scope in itertools.product(
        (
            (EP, "4"),
            (EP, "2", TP, "2", SP),
            (EP, "2", TP, "2", SP, ETP, "1"),
            (TP, "2", SP, ETP, "1", PP, "2"),
            (PP, "2", VPP, "1", EP, "2"),
            (EP, "2", CP, "2", "--moe-layer-freq", "2", "--moe-shared-expert-gate"),
        ),
        ("layer", "expert"),
    ):
        assert_ranks(4, "tiny-moe", "--moa-gate-scope", scope, *words, *ONE)


def check_real_sizes() -> None:
    assert_ranks(2, "moe-2b", EP, "2", "--mock-data")
    assert_ranks(2, "moe-2b", PP, "2", "--num-layers", "16")
    assert_ranks(2, "dense-0.5b", TP, "2", SP, "--moa-align", "64")


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_parameters_of_ranks(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
