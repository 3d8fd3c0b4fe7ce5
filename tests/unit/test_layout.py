"""Layouts that Megatron takes although they look uneven, from what a login node knows of a run."""

from types import SimpleNamespace

import pytest

from moa_megatron import layout, outline

GPT = ["--moa-model", "gpt"]


def problems(recipe: str, world: int, *flags: str) -> list[str]:
    values = outline.outline(recipe, list(flags))
    return layout.problems(SimpleNamespace(**{**values, "world_size": world}))


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        # 14 blocks, and the embedding and the loss as one each.
        (
            4,
            [
                *(*GPT, "--num-layers", "14", "--pipeline-model-parallel-size", "4"),
                "--account-for-embedding-in-pipeline-split",
                "--account-for-loss-in-pipeline-split",
            ],
        ),
        # 512 sequences on 3 ranks: Megatron rounds down, or follows a schedule of sizes.
        (3, ["--decrease-batch-size-if-needed"]),
        (3, ["--step-batch-size-schedule", "0:96 1000:192"]),
        # A virtual stage that is a whole one: no interleaving, so no groups of micro-batches.
        (
            8,
            [
                *("--pipeline-model-parallel-size", "2", "--num-layers", "6"),
                *("--num-layers-per-virtual-pipeline-stage", "3", "--global-batch-size", "12"),
                *("--micro-batch-size", "1"),
            ],
        ),
    ],
)
def test_taken(world: int, flags: list[str]) -> None:
    assert problems("dense-0.12b", world, *flags) == []


def test_refused_without_what_makes_them_fit() -> None:
    uneven = [*GPT, "--num-layers", "14", "--pipeline-model-parallel-size", "4"]
    (found,) = problems("dense-0.12b", 4, *uneven)
    assert "does not divide the blocks (14)" in found
    (found,) = problems("dense-0.12b", 3)
    assert "--global-batch-size=512 is not a multiple" in found
    stages = ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]
    batch = ["--global-batch-size", "12", "--micro-batch-size", "1"]
    (found,) = problems("dense-0.12b", 8, *stages, *batch)
    assert "in groups of 2" in found


def test_no_dense_block_has_no_dense_width() -> None:
    freq = {"moe_layer_freq": [1] * 15, "ffn_hidden_size": 3413}
    split = ["--tensor-model-parallel-size", "2", "--sequence-parallel", *GPT]
    even = ["--moe-ffn-hidden-size", "852", "--moe-shared-expert-intermediate-size", "3412"]
    values = {**outline.outline("moe-2b", [*split, *even]), **freq, "world_size": 2}
    assert layout.problems(SimpleNamespace(**values)) == []
    values["moe_layer_freq"] = [0, *[1] * 14]
    assert "FFN width (3413)" in layout.problems(SimpleNamespace(**values))[0]
