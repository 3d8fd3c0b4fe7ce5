"""Checks before anything is built: every violation in one message, each with its cure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moa_megatron import flags, layout, muon
from moa_megatron.config import MoAConfig
from moa_megatron.data import index_cache
from moa_megatron.data.checking import check_prefix

# Upstream arguments that this entry point does not serve, whatever the FFN.
UNSERVED: dict[str, str] = {
    "fim_data": "fill-in-the-middle data",
    "sft": "supervised fine-tuning data",
    "dataloader_inter_document_masking": "masks between documents",
    "hybrid_context_parallel": "context parallel sizes that vary by sample",
    "per_dataset_sequences_path": "sequence counts from a file",
    "perform_rl_step": "reinforcement learning",
}


def check(args: argparse.Namespace, moa: MoAConfig) -> list[str]:
    """All violations of layout, upstream flags and data that can be seen before building."""
    problems = layout.problems(args) + flags.machine_problems(args) + muon.problems(args)
    if moa.mixing != "fixed":
        problems += flags.problems(args, moa)
    problems += [
        f"--{name.replace('_', '-')}: {what} is not served by this entry point; leave it out"
        for name, what in UNSERVED.items()
        if getattr(args, name, None)
    ]
    problems += layout.schedule_problems(args)
    if args.moa_model == "mae":
        return problems  # its data is checked where it is chosen
    return problems + data_problems(args)


def data_problems(args: argparse.Namespace) -> list[str]:
    """Missing, foreign or truncated data files, and ids beyond the vocabulary."""
    if args.mock_data:
        return []
    try:
        prefixes = data_prefixes(args)
    except (OSError, ValueError, AttributeError) as error:
        return [f"the file that lists the data cannot be read: {error}"]
    if not prefixes:
        return [_no_data(args)]
    problems = tokenizer_problems(args)
    for prefix in prefixes:
        try:
            check_prefix(Path(prefix), args.vocab_size or 2**31)
        except ValueError as error:
            problems.append(str(error))
    return problems


def _no_data(args: argparse.Namespace) -> str:
    """What to do without data: two public corpora, each with the commands that prepare it."""
    samples = args.train_samples or (args.train_iters or 0) * (args.global_batch_size or 0)
    tokens = samples * (args.seq_length or 0)
    need = f" It trains on {tokens / 1e9:.3g} B tokens." if tokens else ""
    # C4's English part has about 156 B tokens in 1,024 files.
    files = -(-tokens // 150_000_000)
    zeros = "0000" if files <= 10 else "000" if files <= 100 else "00" if files <= 1000 else ""
    # DCLM-baseline has about 4 T tokens in 10 x 10 folders.
    folders = min(10, -(-tokens // 36_000_000_000) or 1)
    part = f"global-shard_01_of_10/local-shard_[0-{folders - 1}]_of_10"
    corpora = (
        ("C4", "allenai/c4", f"en/c4-train.{zeros}*", "en/*.json.gz"),
        (
            "DCLM-baseline",
            "mlfoundations/dclm-baseline-1.0",
            f"{part}/*",
            f"{part}/*.jsonl.zst",
        ),
    )
    lines = [
        f"no data: {args.moa_recipe} comes without a corpus and a tokenizer, they are your choice."
        f"{need} Prepare one of these, or your own .jsonl files, and add the flags that "
        "prepare_data.py prints at its end:"
    ]
    for title, name, include, found in corpora:
        folder = f"data/{name.partition('/')[2]}"
        lines += [
            f"  {title}:",
            f"    .venv/bin/hf download {name} --repo-type dataset --include '{include}' "
            f"--local-dir {folder}",
            f"    .venv/bin/python tools/prepare_data.py {folder}/{found} "
            f"--output {folder}/tokens --train-tokenizer {args.vocab_size or 50304} "
            "--split-valid 0.001",
        ]
    lines.append(
        "or try the recipe with --mock-data (random tokens) or --moa-corpus stdlib (small, real "
        "text)"
    )
    return "\n".join(lines)


def index_problems(args: argparse.Namespace) -> list[str]:
    """Dataset indices that a kill has cut or that are older than their data.

    Megatron would take them for good.
    """
    if getattr(args, "moa_model", None) == "mae":
        return []
    try:
        prefixes = [] if args.mock_data else data_prefixes(args)
    except (OSError, ValueError, AttributeError):  # `data_problems` reports it
        prefixes = []
    rebuild = "run tools/prepare_data.py --build-index with this recipe and these flags"
    folders = index_cache.default_folders(prefixes)
    if args.data_cache_path is None:
        rebuild += " and --data-cache-path DIR for both"
    else:
        folders = [Path(args.data_cache_path)]
    problems = []
    for folder in folders:
        problems += [
            f"{problem}: Megatron would read it; remove it, or {rebuild}"
            for problem in index_cache.damaged(folder).values()
        ]
        if old := index_cache.stale(folder, prefixes):
            problems.append(
                f"{folder}: {len(old)} dataset indices are older than their data, such as "
                f"{min(old.values())}.bin: Megatron would train on the order of the earlier data; "
                f"remove the folder, or {rebuild}"
            )
    return problems


def tokenizer_problems(args: argparse.Namespace) -> list[str]:
    """A tokenizer that is not named, or not there."""
    if args.tokenizer_type is None:
        return [
            "--tokenizer-type is missing: give --tokenizer-type HuggingFaceTokenizer and "
            "--tokenizer-model DIR with the tokenizer that made the data"
        ]
    model = args.tokenizer_model
    if model is not None and not Path(model).exists():
        return [f"--tokenizer-model {model} does not exist: give a local folder or file"]
    return []


def data_prefixes(args: argparse.Namespace) -> list[str]:
    """All data prefixes that the arguments name, without blend weights."""
    prefixes: list[str] = []
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        prefixes += getattr(args, name) or []
    if args.data_args_path is not None:
        prefixes += Path(args.data_args_path).read_text(encoding="utf-8").split()
    if args.per_split_data_args_path is not None:
        for items in json.loads(Path(args.per_split_data_args_path).read_text("utf-8")).values():
            prefixes += (items.split() if isinstance(items, str) else items) or []
    return [item for item in prefixes if not _is_number(item)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
