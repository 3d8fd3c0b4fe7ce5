"""The entry point on Transformer Engine: what it derives, builds and accepts. Nothing runs."""

from __future__ import annotations

import os
import tempfile
from typing import Any
from unittest import mock

import pytest

from moa_megatron import recipes
from tests.helpers import te, tiny
from tests.unit.test_features import rows

SEQUENTIAL = ("--set", "moe_grouped_gemm=false")


def prepare(*words: str, world: int = 1) -> Any:
    from moa_megatron import launch

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(
            os.environ,
            # The last two as launch/env.sh sets them.
            {
                **{"WORLD_SIZE": str(world), "RANK": "0"},
                **{"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NVTE_CPU_OFFLOAD_V1": "1"},
            },
        ),
    ):
        argv = [*words, "--run-dir", f"{folder}/run", "--mock-data", "--use-cpu-initialization"]
        return launch.prepare(recipes.parse_command_line(argv), [])


def check_entry_point_builds_on_the_engine() -> None:
    tiny.start()
    from megatron.core.process_groups_config import ProcessGroupCollection

    for words, expected in (
        (("tiny-dense",), {"MoAMLP", "TEColumnParallelLinear", "HybridStack"}),
        (("tiny-dense", "--moa-model", "gpt"), {"MoAMLP", "TEColumnParallelLinear", "GPTModel"}),
        (("tiny-moe", *SEQUENTIAL), {"MoASequentialMLP", "MoASharedExpertMLP", "HybridStack"}),
        (("tiny-moe", "--moa-mixing", "fixed"), {"TEGroupedMLP", "SharedExpertMLP"}),
    ):
        run = prepare(*words)
        assert run.args.transformer_impl == "transformer_engine", "the default where it runs"
        assert run.args.moe_grouped_gemm == (expected >= {"TEGroupedMLP"})
        assert not run.args.gradient_accumulation_fusion, "Megatron's output layer lacks it"
        run.config.vocab_size = 64
        builder = run.config.get_builder_cls()(run.config)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        built = builder.build_model(groups, pre_process=True, post_process=True)
        assert {type(module).__name__ for module in built.modules()} >= expected
        names = [hook.__name__ for hook in run.config.pre_wrap_hooks]
        forget = [] if run.moa.mixing == "fixed" else ["forget_norm_states"]
        assert names == ["recompute_no_empty_mlps", *forget]
    assert not prepare("tiny-moe", "--transformer-impl", "local").args.moe_grouped_gemm


def check_megatron_accepts_what_the_table_calls_built() -> None:
    """Megatron's validation, on four processes; the flags of a row are all that a user adds."""
    tiny.start()
    refused = {}
    for feature, words, _, engine in rows():
        grouped = "--moe-grouped-gemm" in words
        if engine == "refused":
            continue
        small = ("--micro-batch-size", "2", "--bf16", *(() if grouped else SEQUENTIAL))
        try:
            prepare("tiny-moe", *words, *small, world=4)
        except recipes.RefusedError as error:
            refused[feature] = str(error)
    assert not refused, refused


def check_every_side_of_the_comparisons_is_accepted() -> None:
    """tools/check_numerics.py and tools/bench.py --step on a GPU: no side ends with a refusal."""
    tiny.start()
    from tools.benchmarks.sides import SIDES

    refused = {}
    for recipe in ("tiny-dense", "tiny-moe", "moe-2b", "dense-0.5b"):
        experts = bool(recipes.load(recipe).get("num_experts"))
        for name, side in SIDES.items():
            if ("dense" if experts else "experts") in side.needs:
                continue
            try:
                prepare(recipe, *side.flags, "--moa-align", "64")
            except recipes.RefusedError as error:
                refused[recipe, name] = str(error)
    assert not refused, refused
    for name in ("fp8-delayed", "fixed-fp8"):
        with pytest.raises(recipes.RefusedError, match=r"moe_ffn_hidden_size=84: .*--moa-align 64"):
            prepare("tiny-moe", *SIDES[name].flags)
    with pytest.raises(recipes.RefusedError, match=r"ffn_hidden_size=344: FP8 products need mult"):
        prepare("tiny-dense", *SIDES["fp8-blockwise"].flags)
    blocks = ("--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "mxfp8", "--ffn-hidden-size", "48")
    with pytest.raises(recipes.RefusedError, match=r"ffn_hidden_size=48: .* multiples of 32; add"):
        prepare("tiny-dense", *blocks)
    prepare("tiny-dense", *SIDES["fp8-blockwise"].flags, "--ffn-hidden-size", "48")


def check_mixtures_take_the_finest_scales_by_default() -> None:
    tiny.start()
    from megatron.core.extensions.transformer_engine import FP8GlobalStateManager as manager

    words = ("tiny-dense", "--bf16", "--fp8-format", "hybrid", "--moa-align", "64")
    for micro, blocks, recipe in (
        (True, True, "mxfp8"),
        (False, True, "blockwise"),
        (False, False, "tensorwise"),
    ):
        with (
            mock.patch.object(manager, "is_mxfp8_available", lambda micro=micro: (micro, "")),
            mock.patch.object(
                manager, "is_fp8_block_scaling_available", lambda blocks=blocks: (blocks, "")
            ),
        ):
            run = prepare(*words)
        assert run.args.fp8_recipe == recipe
        assert f"  numbers      bf16, FP8 hybrid with {recipe} scales" in run.summary()
    assert prepare(*words, "--fp8-recipe", "delayed").args.fp8_recipe == "delayed"
    assert prepare(*words, "--moa-mixing", "fixed").args.fp8_recipe == "delayed"


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return te.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_entry(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
