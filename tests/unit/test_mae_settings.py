"""Flags of masked autoencoders: what follows from them, and refusals that name field and cure."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import isolated


def prepared(*words: str, recipe: str = "tiny-mae") -> Any:
    from moa_megatron import host

    host.install()
    from moa_megatron import launch, recipes

    argv = [recipe, "--dry-run", *words]
    return launch.prepare(recipes.parse_command_line(argv), host.HOST_ARGS)


def refusal(*words: str, recipe: str = "tiny-mae") -> str:
    from moa_megatron.recipes import RefusedError

    with pytest.raises(RefusedError) as caught:
        prepared(*words, recipe=recipe)
    return str(caught.value)


MOCK = "--mock-data"


def check_every_mistake_is_named_at_once() -> None:
    found = refusal(
        *(MOCK, "--patch-dim", "5", "--mae-mask-ratio", "1.0", "--mae-crop-scale", "0.5", "0.2"),
        *("--mae-pixel-std", "0", "1", "1", "--mae-decoder-heads", "5", "--num-channels", "1"),
    )
    for text in (
        "--img-h 28 does not divide into patches of --patch-dim 5",
        "--mae-mask-ratio 1.0",
        "--mae-crop-scale 0.5 0.2",
        "--mae-pixel-std",
        "--mae-decoder-heads 5 does not divide --mae-decoder-width 48",
        "--num-channels 1",
    ):
        assert text in found, text


def check_parallelism_that_images_lack() -> None:
    for words, reason in (
        (("--pipeline-model-parallel-size", "2"), "use data and tensor parallelism"),
        (("--context-parallel-size", "2"), "images have no long context"),
        (("--sequence-parallel",), "197 and 50 tokens do not divide"),
        (("--tokens", "10M"), "use --epochs"),
        (("--use-torch-fsdp2",), "use --use-distributed-optimizer"),
        (("--num-experts", "4"), "not served with --moa-model mae"),
    ):
        found = refusal(MOCK, *words)
        assert words[0] in found and reason in found, found


def check_sizes_follow_the_image() -> None:
    args = prepared(MOCK, recipe="mae-vit-b").args
    assert (args.seq_length, args.mae_decoder_ffn, args.ffn_hidden_size) == (197, 1365, 2048)
    assert args.dataloader_type == "external"
    aligned = prepared(MOCK, "--moa-align", "64", recipe="mae-vit-b").args
    assert (aligned.mae_decoder_ffn, aligned.ffn_hidden_size) == (1408, 2048)
    type1 = prepared(MOCK, "--moa-variant", "type1").args
    assert (type1.ffn_hidden_size, type1.mae_decoder_ffn) == (4 * 96, 4 * 48)


def check_old_checkpoints_are_not_other_models() -> None:
    import copy

    from moa_megatron import checkpoints

    for words in (("tiny-dense",), ("tiny-dense", "--moa-model", "gpt"), ("tiny-mae",)):
        args = prepared(MOCK, *words[1:], recipe=words[0]).args
        saved = copy.copy(args)
        saved.num_query_groups = saved.num_attention_heads  # as Megatron leaves it
        if words[0] != "tiny-mae":
            for name in [name for name in vars(saved) if name.startswith("mae_")]:
                delattr(saved, name)
        assert checkpoints.differences(args, saved) == []
    saved.mae_decoder_width = 64
    assert "mae_decoder_width: checkpoint 64" in checkpoints.differences(args, saved)[0]


def check_learning_rates_follow_the_variant() -> None:
    assert prepared(MOCK, recipe="mae-vit-b").args.lr == 1.2e-3
    assert prepared(MOCK, "--moa-mixing", "fixed", recipe="mae-vit-b").args.lr == 3e-4


def check_images_must_be_named() -> None:
    assert "--train-data-path and --valid-data-path" in refusal(recipe="mae-vit-b")
    folder = str(Path(__file__).parent)
    assert "without --train-data-path: give both" in refusal("--valid-data-path", folder)
    assert "--valid-data-path is missing" in refusal("--train-data-path", folder)
    assert "no images" in refusal("--train-data-path", folder, "--valid-data-path", folder)


def check_a_dry_run_checks_no_images() -> None:
    # Prepared, but not indexed in this cache.
    import tempfile

    from moa_megatron.vision import digits

    with tempfile.TemporaryDirectory() as cache:
        assert "not checked yet" in prepared("--moa-cache-dir", cache).data
        assert not list(Path(cache).glob("images/*"))
        assert digits.digits(Path(cache)).train.is_dir()


def check_a_dry_run_of_a_continuation_knows_no_images() -> None:
    import copy
    import tempfile

    from moa_megatron import identity

    with tempfile.TemporaryDirectory() as cache:
        args = prepared("--moa-cache-dir", cache).args
    saved = copy.copy(args)
    before = {**identity.describe(args), "training data": "0123456789ab"}
    args.load, args.moa_data_identity = "somewhere", identity.describe(args)
    saved.moa_data_identity = before
    assert identity.problems(args, saved) == []
    args.moa_image_digests = {"train": "ba9876543210"}
    args.moa_data_identity = identity.describe(args)
    (problem,) = identity.problems(args, saved)
    assert "training data: checkpoint 0123456789ab, this run ba9876543210" in problem


def check_weight_decay_spares_tokens_norms_and_biases() -> None:
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides

    from moa_megatron.vision.building import build_model

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    run = prepared(MOCK)
    model = build_model(run.config)
    overrides = get_standard_config_overrides(OptimizerConfig(optimizer="adam", lr=1e-3))
    spared = set()
    for name, parameter in model.named_parameters():
        for key, change in overrides.items():
            if key.matches(parameter, name) and change.get("wd_mult") == 0.0:
                spared.add(name)
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.endswith("bias") or "norm" in name or "token" in name
    }
    assert spared == expected


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_settings(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
