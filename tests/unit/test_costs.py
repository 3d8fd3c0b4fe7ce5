"""Parameter formulas against models that Megatron builds, and the paper's exact totals."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.helpers import isolated

PAPER = {
    "dense-0.12b": 119_744_256,
    "dense-0.12b-long": 119_744_256,
    "dense-0.25b": 254_018_560,
    "dense-0.5b": 482_696_960,
    "moe-0.25b": 251_044_480,
    "moe-0.5b": 480_942_336,
    "moe-0.8b": 797_327_040,
    "moe-1b": 1_058_931_712,
    "moe-2b": 1_996_574_720,
}
ACTIVE = {
    "moe-0.25b": 0.1136,
    "moe-0.5b": 0.1837,
    "moe-0.8b": 0.2812,
    "moe-1b": 0.3550,
    "moe-2b": 0.6209,
}
# Totals with --moa-align 64, as the recipes state them.
ALIGNED = {
    "dense-0.25b": 254_829_568,
    "dense-0.5b": 485_669_120,
    "moe-0.25b": 259_408_000,
    "moe-1b": 1_085_694_976,
    "moe-2b": 2_078_309_120,
}


def gates(recipe: str) -> int:
    """14 d a layer for the bi-sided default of dense recipes, 10 d for quadratic MoE."""
    from moa_megatron import recipes

    values = recipes.load(recipe)
    return int(values["num_layers"] * values["hidden_size"] * (10 if "moe" in recipe else 14))


def prepared(recipe: str, *words: str) -> Any:
    from moa_megatron import host

    host.install()
    from moa_megatron import launch, patches, recipes

    patches.apply()
    argv = [recipe, "--run-dir", "runs/never-made", "--mock-data", *words]
    return launch.prepare(recipes.parse_command_line(argv), host.HOST_ARGS)


def built(run: Any) -> torch.nn.Module:
    """The model of a run on the meta device: shapes without memory."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from moa_megatron import models

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = models.model_config(run.args, run.moa)
    config.transformer.perform_initialization = False
    meta = torch.device("meta")
    with meta, mock.patch("torch.cuda.current_device", lambda: meta):
        builder = config.get_builder_cls()(config)
        return builder.build_model(  # type: ignore[no-any-return]
            ProcessGroupCollection.use_mpu_process_groups(), pre_process=True, post_process=True
        )


def assert_counts(run: Any) -> Any:
    from moa_megatron import costs

    model = built(run)
    expected = costs.parameters(run.args, run.moa, run.args.padded_vocab_size)
    actual = {name: p.numel() for name, p in model.named_parameters()}
    gates = sum(size for name, size in actual.items() if "moa_gate" in name)
    assert (sum(actual.values()), gates) == (expected.total, expected.gates)
    return expected


def check_every_recipe_is_here() -> None:
    from moa_megatron import recipes

    ours = {"tiny-dense", "tiny-moe", "dense-0.12b-d5", "tiny-mae", "mae-vit-b"}
    assert set(recipes.available()) == set(PAPER) | ours


def check_paper_totals_are_exact() -> None:
    for recipe, total in PAPER.items():
        fixed = assert_counts(prepared(recipe, "--moa-mixing", "fixed"))
        assert (fixed.total, fixed.gates) == (total, 0), recipe
        if recipe in ACTIVE:
            assert round(fixed.active / 1e9, 4) == ACTIVE[recipe], recipe
        moa = assert_counts(prepared(recipe))
        assert (moa.total, moa.gates) == (total + gates(recipe), gates(recipe)), recipe


def check_masked_autoencoders_are_counted() -> None:
    for recipe in ("tiny-mae", "mae-vit-b"):
        for words in (["--moa-mixing", "fixed"], ["--moa-variant", "bi"], ["--moa-mixing", "la"]):
            run = prepared(recipe, *words)
            expected = assert_counts(run)
            kept = ("patch_embedding", "class_token", "encoder.")
            named = built(run).named_parameters()
            assert expected.active == sum(p.numel() for n, p in named if n.startswith(kept))
    assert_counts(prepared("tiny-mae", "--moa-variant", "type1"))


def check_flops_of_images_are_those_of_the_plain_model() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from moa_megatron.vision.costs import flops
    from moa_megatron.vision.masking import visible_patches
    from moa_megatron.vision.reference import MAE, MAEShape

    run = prepared("tiny-mae", "--moa-variant", "qd")
    args = run.args
    shape = MAEShape(
        image=(args.img_h, args.img_w),
        patch=args.patch_dim,
        width=args.hidden_size,
        layers=args.num_layers,
        heads=args.num_attention_heads,
        ffn=args.ffn_hidden_size,
        decoder_width=args.mae_decoder_width,
        decoder_layers=args.mae_decoder_layers,
        decoder_heads=args.mae_decoder_heads,
        decoder_ffn=args.mae_decoder_ffn,
    )
    plain, visible = MAE(shape, run.moa), visible_patches(1, range(2), 49, 0.75)
    # The fused kernels of a CPU are not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(torch.randn(2, 3, 28, 28), visible)
    assert 3 * counter.get_total_flops() / 2 == flops(args, run.moa)


def check_gpt_has_the_same_totals() -> None:
    for recipe in ("dense-0.25b", "moe-2b"):
        moa = assert_counts(prepared(recipe, "--moa-model", "gpt"))
        assert moa.total == PAPER[recipe] + gates(recipe), recipe


def check_aligned_widths() -> None:
    for recipe, exact in PAPER.items():
        run = prepared(recipe, "--moa-align", "64")
        total = assert_counts(run).total - gates(recipe)
        assert total == ALIGNED.get(recipe, exact), recipe
        widths = [run.args.ffn_hidden_size, run.args.moe_ffn_hidden_size or 64]
        assert not any(width % 64 for width in widths), recipe


def check_recipes_state_their_counts() -> None:
    from moa_megatron import recipes

    page = (recipes.RECIPES.parents[1] / "docs" / "recipes.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line[:1] == "|"}
    for recipe, total in PAPER.items():
        aligned = f"{ALIGNED[recipe]:,}" if recipe in ALIGNED else "the same"
        assert f"| {total:,} |" in rows[recipe] and rows[recipe].endswith(f"| {aligned} |"), recipe
        words = (recipes.RECIPES / f"{recipe}.yaml").read_text()
        if recipe != "dense-0.12b-long":
            assert f"{total:,}" in words, recipe
        assert f"{ALIGNED.get(recipe, 0):,}" in words or recipe not in ALIGNED, recipe
        assert f"{ACTIVE.get(recipe, 0):.4f} B active" in words or recipe not in ACTIVE, recipe


def check_the_control_is_5_units_wider() -> None:
    control = assert_counts(prepared("dense-0.12b-d5"))
    bi = PAPER["dense-0.12b"] + gates("dense-0.12b")
    assert (control.total, control.gates) == (119_813_376, 0)
    assert control.total - bi == 6 * (15 - 14) * 768
    aligned = assert_counts(prepared("dense-0.12b-d5", "--moa-align", "64"))
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    assert f"{control.total:,}" in page and f"{aligned.total:,}" in page


def check_every_kind_of_ffn() -> None:
    for words in (
        ("--moa-variant", "type1"),
        ("--moa-variant", "one", "--moa-gate-scope", "expert"),
        ("--moa-mixing", "la", "--moa-variant", "qd"),
        ("--moa-mixing", "la", "--moa-gate-scope", "expert", "--moe-layer-freq", "2"),
        ("--mtp-num-layers", "1"),
        ("--mtp-num-layers", "1", "--moa-model", "gpt", "--moa-gate-scope", "expert"),
        ("--moe-shared-expert-gate", "--moa-dictionary", "id", "silu"),
    ):
        assert_counts(prepared("tiny-moe", *words))
    assert_counts(prepared("tiny-dense", "--moa-variant", "type1"))


def check_gpt_mtp_gets_gates() -> None:
    names = [
        name
        for name, _ in built(
            prepared("tiny-dense", "--mtp-num-layers", "1", "--moa-model", "gpt")
        ).named_parameters()
    ]
    assert any(name.startswith("mtp.") and "moa_gate" in name for name in names), names


def check_muon_leaves_gates_to_adamw() -> None:
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS
    from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer

    (override,) = _EMERGING_OPTIMIZERS["muon"].default_param_overrides.items()
    key, settings = override
    assert settings == {"optimizer": "adam"}
    for recipe in ACTIVE:
        for name, parameter in built(prepared(recipe)).named_parameters():
            on_adam = key.predicate.fn(parameter)
            outside = ("moa_gate", "embedding", "output_layer", "norm")
            assert on_adam == any(part in name for part in outside), (recipe, name)
            assert on_adam or name.endswith(
                ("fc1.weight", "fc2.weight", "proj.weight", "qkv.weight", "router.weight")
            ), (recipe, name)
            if parameter.dim() == 2:
                assert is_managed_by_layer_wise_optimizer(parameter) == (not on_adam), name


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_costs(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
