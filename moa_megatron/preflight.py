"""Checks before anything is built: every violation in one message, each with its cure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moa_megatron import flags, layout
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
    problems = layout.problems(args) + flags.machine_problems(args)
    if moa.mixing != "fixed":
        problems += flags.problems(args, moa)
    problems += [
        f"--{name.replace('_', '-')}: {what} is not served by this entry point; leave it out"
        for name, what in UNSERVED.items()
        if getattr(args, name, None)
    ]
    problems += layout.schedule_problems(args)
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
        return [
            "no data: give --data-path PREFIX (or --train-data-path and --valid-data-path) with "
            "--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR, made by "
            "tools/prepare_data.py, for example from FineWeb-Edu or SlimPajama: "
            ".venv/bin/python tools/prepare_data.py shard-*.jsonl --output data/web "
            "--train-tokenizer 50304 --split-valid 0.01; or --mock-data for random tokens, or "
            "--moa-corpus stdlib"
        ]
    problems = tokenizer_problems(args)
    for prefix in prefixes:
        try:
            check_prefix(Path(prefix), args.vocab_size or 2**31)
        except ValueError as error:
            problems.append(str(error))
    return problems


def index_problems(args: argparse.Namespace) -> list[str]:
    """Dataset indices that a kill has cut; Megatron would take them for whole."""
    if args.data_cache_path is None:
        return []
    return [
        f"{problem}: Megatron would read it; remove it, or run tools/prepare_data.py "
        "--build-index with this recipe and these flags"
        for problem in index_cache.damaged(Path(args.data_cache_path)).values()
    ]


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
