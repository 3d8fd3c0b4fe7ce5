"""Arguments and preflight with Megatron's real parser: what is derived, what is refused and how."""

import argparse
import fnmatch
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from moa_megatron import recipes
from moa_megatron.recipes import RefusedError
from tests.helpers import isolated


def prepare(*words: str, world: int = 1) -> Any:
    """The run that a command line describes, on a machine of `world` processes."""
    from moa_megatron import host

    host.install()
    from moa_megatron import launch, patches

    patches.apply()
    with tempfile.TemporaryDirectory() as folder:
        argv = ["tiny-moe", "--run-dir", f"{folder}/run", *words]
        command = recipes.parse_command_line(argv[1:] if words[:1] == ("--recipe",) else argv)
        with mock.patch.dict(os.environ, {"WORLD_SIZE": str(world), "RANK": "0"}):
            run = launch.prepare(command, host.HOST_ARGS)
        assert not Path(folder, "run").exists(), "preflight must leave no run folder behind"
        return run


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    with pytest.raises(RefusedError) as caught:
        yield
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in:\n{caught.value}"


def args_of(*words: str, world: int = 1) -> argparse.Namespace:
    return prepare("--mock-data", *words, world=world).args  # type: ignore[no-any-return]


def check_pattern_follows_megatron_flags() -> None:
    assert args_of().hybrid_layer_pattern == "*E*E*E*E"
    assert args_of("--moe-layer-freq", "2").hybrid_layer_pattern == "*E*-*E*-"
    assert args_of("--mtp-num-layers", "1").hybrid_layer_pattern == "*E*E*E*E/*E"
    virtual = args_of(
        *("--num-layers-per-virtual-pipeline-stage", "1", "--micro-batch-size", "1"),
        *("--pipeline-model-parallel-size", "2"),
        world=2,
    )
    assert virtual.hybrid_layer_pattern == "*E|*E|*E|*E"
    assert virtual.virtual_pipeline_model_parallel_size == 2
    own = args_of(
        *("--hybrid-layer-pattern", "*E*-*E*-/*-", "--num-virtual-stages-per-pipeline-rank", "2"),
        *("--pipeline-model-parallel-size", "2", "--micro-batch-size", "1"),
        world=2,
    )
    assert own.hybrid_layer_pattern == "*E|*-|*E|*-/*-"
    assert args_of("--moa-model", "gpt").hybrid_layer_pattern is None


def check_type1_is_ungated_and_wider() -> None:
    args = args_of("--moa-variant", "type1")
    assert not args.swiglu and args.moe_ffn_hidden_size == 126
    assert args.moe_shared_expert_intermediate_size == 516
    kept = args_of("--moa-variant", "type1", "--moe-ffn-hidden-size", "100")
    assert kept.moe_ffn_hidden_size == 100
    widened = args_of("--moa-variant", "type1", "--set", "swiglu=false")
    assert widened.moe_ffn_hidden_size == 126, "saying it twice must not change the model"


def check_fixed_keeps_megatron_flags() -> None:
    args = args_of("--moa-mixing", "fixed", "--set", "swiglu=false", "--squared-relu")
    assert args.squared_relu and not args.swiglu
    with refused("--moa-variant with --moa-mixing fixed", "--set swiglu=false"):
        args_of("--moa-mixing", "fixed", "--moa-variant", "type1")


def check_settings_of_the_method() -> None:
    with refused("dictionary='silo'", "did you mean 'silu'", "repeats id"):
        args_of("--moa-dictionary", "silo", "id", "id")
    with refused("gate='tanh' with mixing='la'"):
        args_of("--moa-mixing", "la", "--moa-gate", "tanh")
    with refused("variant='qdd' is unknown", "did you mean 'qd'"):
        args_of("--moa-variant", "qdd")
    with refused("swiglu=False was asked for"):
        args_of("--set", "swiglu=false")
    with refused("--moa-varient is no flag", "did you mean '--moa-variant'"):
        args_of("--moa-varient", "qd")
    with refused("--moa-model htbrid is unknown", "did you mean 'hybrid'"):
        args_of("--moa-model", "htbrid")


def check_upstream_flags_that_moa_cannot_honour() -> None:
    from moa_megatron import flags, preflight

    with refused("--moe-apply-probs-on-input", "leave it out", "--squared-relu", "--quick-geglu"):
        args_of("--moe-apply-probs-on-input", "--squared-relu", "--quick-geglu")
    overlap = ("--moe-shared-expert-overlap", "--moa-log-interval", "0", "--cuda-graph-scope")
    for graphs in (("--cuda-graph-impl", "local"), ("--enable-cuda-graph",)):
        with refused("--cuda-graph-modules moe_router cannot go with MoA"):
            args_of(*overlap, "moe_router", *graphs)
    with refused("--cuda-graph-modules moe_preprocess cannot go with MoA"):
        args_of(*overlap, "moe_router", "moe_preprocess", "--external-cuda-graph")
    with refused("--decoupled-lr", "AdamW under Muon"):
        args_of("--decoupled-lr", "1e-3")
    with refused("--transformer-impl inference_optimized cannot go with MoA"):
        args_of("--transformer-impl", "inference_optimized")
    with refused("transformer_engine cannot run here: it needs a CUDA device", "impl local"):
        args_of("--transformer-impl", "transformer_engine")
    with refused("has a layer M, which Megatron has on Transformer Engine only"):
        args_of("--hybrid-layer-pattern", "M*-", "--moa-mixing", "fixed")
    with refused("--moe-latent-size=8 with --moa-gate-scope layer", "use --moa-gate-scope expert"):
        args_of("--moe-latent-size", "8")
    with refused("--sft: supervised fine-tuning data is not served"):
        args_of("--sft", "--moa-mixing", "fixed")
    with refused("Megatron refuses these arguments", "nonsense"):
        args_of("--recompute-granularity", "selective", "--recompute-modules", "nonsense")
    known = vars(args_of())
    absent = [n for n in (*flags.FORBIDDEN, *preflight.UNSERVED) if n not in known]
    # The flag exists where the kitchen library is installed; any other absence is a typing error.
    assert set(absent) <= {"use_kitchen"}, absent


def check_layout_violations_come_together() -> None:
    with refused(
        "3 processes cannot hold",
        "--tensor-model-parallel-size=3 does not divide the attention heads (4)",
        "choose from 1, 2, 4",
        "--pipeline-model-parallel-size=3 does not divide the layers of the pattern (8)",
        "--expert-model-parallel-size=3 does not divide the experts (8); choose from 1, 2, 4, 8",
        "needs --sequence-parallel",
    ):
        args_of(
            *("--tensor-model-parallel-size", "3", "--pipeline-model-parallel-size", "3"),
            *("--expert-model-parallel-size", "3"),
            world=3,
        )
    with refused("--global-batch-size=6 is not a multiple", "nearest: 8"):
        args_of("--global-batch-size", "6")
    legal = ("--eval-micro-batch-size", "4", "--eval-global-batch-size", "4")
    assert args_of(*legal).eval_micro_batch_size == 4
    for words, message in (
        (("--num-virtual-stages-per-pipeline-rank", "3"), "does not cut 4 blocks"),
        (("--hybrid-layer-pattern", "*E|*E|*E|*E"), "the layer pattern has its own stages"),
    ):
        stages = ("--num-layers-per-virtual-pipeline-stage", "1")
        with refused(message):
            args_of(
                *words,
                *(stages if "pattern" in words[0] else ()),
                *("--pipeline-model-parallel-size", "2"),
                world=2,
            )
    uneven = args_of(
        "--hybrid-layer-pattern", "*E*E*E|*E", "--pipeline-model-parallel-size", "2", world=2
    )
    assert uneven.moa_num_blocks == 4
    torn = ("--num-layers", "3", "--pipeline-model-parallel-size", "2")
    assert args_of(*torn, world=2).hybrid_layer_pattern == "*E*E*E"
    with refused("does not divide the blocks (3)"):
        args_of(*torn, "--moa-model", "gpt", world=2)
    groups = ("--group-query-attention", "--num-query-groups")
    with refused("--num-query-groups=3 does not divide the attention heads (4)"):
        args_of(*groups, "3")
    copied = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    assert args_of(*groups, "1", *copied, world=2).num_query_groups == 1
    stages = ("--num-layers-per-virtual-pipeline-stage", "1", "--pipeline-model-parallel-size", "2")
    with refused("a step has 1 on each rank: choose batch sizes that give a multiple of 2"):
        args_of(*stages, "--global-batch-size", "8", "--micro-batch-size", "8", world=2)
    with refused("--moe-router-topk=9 exceeds --num-experts=8"):
        args_of("--moe-router-topk", "9")
    with refused("does not divide the experts' width (85)"):
        args_of(
            *("--moe-ffn-hidden-size", "85", "--tensor-model-parallel-size", "2"),
            "--sequence-parallel",
            world=2,
        )
    odd = ("--moe-shared-expert-intermediate-size", "3413", "--tensor-model-parallel-size", "2")
    with refused("FFN width (3413); add --moa-align 64 to round FFN widths up, or choose from 1"):
        args_of(*odd, "--sequence-parallel", world=2)
    aligned = args_of(*odd, "--sequence-parallel", "--moa-align", "64", world=2)
    assert aligned.moe_shared_expert_intermediate_size == 3456
    with refused("--lr-warmup-iters=300 does not end within 150 steps"):
        args_of("--lr-warmup-iters", "300")


def check_tokenizer_problems() -> None:
    with refused("--tokenizer-type is missing"):
        prepare("--data-path", "/nowhere/x", "--vocab-size", "64")
    with refused("--tokenizer-model /nope does not exist"):
        prepare(
            *("--data-path", "/nowhere/x", "--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", "/nope"),
        )
    with refused("brings its own tokenizer"):
        prepare("--tokenizer-type", "NullTokenizer", "--vocab-size", "64")


def check_a_larger_tokenizer_raises_the_recipes_vocabulary() -> None:
    from tokenizers import Tokenizer, models

    from moa_megatron import launch

    common = {"make_vocab_size_divisible_by": 16, "tensor_model_parallel_size": 1}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {f"w{i}": i for i in range(60_000)}
        Tokenizer(models.WordLevel(vocabulary, "w0")).save(f"{folder}/tokenizer.json")
        for stated, given, size in (
            (50304, set(), 60_000),
            (70_000, set(), 70_000),
            (None, set(), 60_000),
            (50304, {"vocab_size"}, 50304),
        ):
            args = argparse.Namespace(
                tokenizer_model=folder, vocab_size=stated, padded_vocab_size=None, **common
            )
            launch._pad_vocabulary(args, given)
            assert args.vocab_size == size and args.padded_vocab_size >= size


def check_data_problems() -> None:
    with refused("/nowhere/x"):
        prepare(
            "--data-path", "/nowhere/x", "--vocab-size", "64", "--tokenizer-type", "NullTokenizer"
        )
    with refused("no data: ", "tools/prepare_data.py", "allenai/c4", "dclm-baseline"):
        prepare("--moa-corpus", "none")
    with refused("cannot be read"):
        prepare("--data-args-path", "/nowhere/list.txt")
    with tempfile.TemporaryDirectory() as folder:
        foreign = Path(folder, "f")
        Path(f"{foreign}.idx").write_bytes(b"not an index at all")
        Path(f"{foreign}.bin").write_bytes(b"xx")
        with refused(str(foreign)):
            prepare("--data-path", str(foreign), "--vocab-size", "64")


def check_the_advised_preparation_runs_as_printed() -> None:
    """On a corpus of the same names and forms; the shell expands the patterns."""
    import gzip
    import subprocess
    import sys

    import zstandard

    from moa_megatron import host

    host.install()
    from moa_megatron import launch

    with pytest.raises(RefusedError) as caught:
        launch.prepare(recipes.parse_command_line(["moe-2b", "--dry-run"]), host.HOST_ARGS)
    lines = str(caught.value).splitlines()
    commands = [line.strip() for line in lines if "prepare_data.py data/" in line]
    fetched = [line.strip() for line in lines if "hf download" in line]
    assert len(commands) == len(fetched) == 2
    text = "".join(f'{{"text": "document {i} of a corpus"}}\n' for i in range(9000)).encode()
    names = (
        "en/c4-train.00003-of-01024.json.gz",
        "global-shard_01_of_10/local-shard_1_of_10/shard_00000000_processed.jsonl.zst",
    )
    packed = (gzip.compress(text), zstandard.ZstdCompressor().compress(text))
    root = Path(__file__).parents[2]
    for command, fetch, name, raw in zip(commands, fetched, names, packed):
        include = shlex.split(fetch)[shlex.split(fetch).index("--include") + 1]
        assert fnmatch.fnmatch(name, include), (name, include)
        with tempfile.TemporaryDirectory() as folder:
            local = shlex.split(fetch)[-1]
            path = Path(folder, local, name)
            path.parent.mkdir(parents=True)
            path.write_bytes(raw)
            words = command.replace(".venv/bin/python", sys.executable)
            words = words.replace("tools/", f"{root}/tools/")
            done = subprocess.run(words, shell=True, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert f"train with: --train-data-path {local}/tokens-train" in done.stdout


def check_broken_run_folder_is_not_restarted() -> None:
    from moa_megatron import host

    host.install()
    from moa_megatron import launch

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "checkpoints", "iter_0000004").mkdir(parents=True)
        command = recipes.parse_command_line(["tiny-moe", "--run-dir", folder, "--mock-data"])
        Path(folder, "checkpoints", "latest_checkpointed_iteration.txt").write_text("")
        with refused("instead of a step"):
            launch.prepare(command, host.HOST_ARGS)


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_preflight(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
