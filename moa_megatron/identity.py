"""What fixes the order of training samples, kept in every checkpoint and compared on resume.

Megatron continues the data of a run from one number, the samples it has consumed. That is the same
place only while everything else that decides the order of samples stays as it was.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moa_megatron.data.token_files import pair

logger = logging.getLogger(__name__)

NAME = "moa_data_identity"
_VALIDATION = "validation data"
_BLOCK, _BLOCKS = 1 << 14, 16
# GPTDataset gives the last pass over the data a shuffle of its own if less of it is used.
_SEPARATE_BELOW = 0.80

Identity = dict[str, Any]


def describe(args: argparse.Namespace) -> Identity:
    """The identity of a run's data, of plain values.

    Args:
        args: Megatron's namespace after validation.

    Raises:
        OSError: a data file cannot be read.
    """
    if getattr(args, "moa_model", None) == "mae":
        from moa_megatron.vision import data

        return data.identity(args)
    identity: Identity = {
        "sequence length": args.seq_length,
        "seed": args.seed,
        "order": args.dataloader_type,
        "tokenizer": _tokenizer(args),
    }
    if args.dataloader_type == "cyclic":
        identity["data parallel size"] = args.data_parallel_size
    if args.mock_data:
        return {**identity, "training data": "random tokens"}
    from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
    from megatron.training.utils import get_blend_and_blend_per_split

    common, per_split = get_blend_and_blend_per_split(args)
    train, valid = (common, None) if per_split is None else per_split[:2]
    identity["training data"] = _blend(train)
    if valid is not None:
        identity[_VALIDATION] = _blend(valid)
    if common is not None:
        shares = parse_and_normalize_split(args.split)
        identity["split"] = ", ".join(f"{share:.6g}" for share in shares)
    identity["passes over the training data"] = list(_passes(args, train, common is not None))
    return identity


def differences(saved: Identity, identity: Identity) -> list[str]:
    """What differs between a checkpoint's identity and a run's, in the checkpoint's words first."""
    return [
        f"{key}: checkpoint {_short(saved.get(key))}, this run {_short(identity.get(key))}"
        for key in dict.fromkeys([*saved, *identity])
        if saved.get(key) != identity.get(key)
    ]


def problems(args: argparse.Namespace, saved: Any) -> list[str]:
    """The refusal of a resume on other data, or nothing.

    Args:
        args: the run's namespace, with its identity.
        saved: the checkpoint's namespace; one of plain Megatron says nothing about its data.
    """
    before = getattr(saved, NAME, None)
    if before is None or args.finetune or args.skip_train:
        return []
    now = getattr(args, NAME)
    if getattr(args, "moa_model", None) == "mae":
        # A dry run checks no images, and leaves out what it does not know of them.
        now = {**{key: before[key] for key in before if key not in now}, **now}
    if before.get(_VALIDATION) != now.get(_VALIDATION):
        logger.warning("the validation data is not that of the checkpoint's run")
        now = {**now, _VALIDATION: before.get(_VALIDATION)}
    found = differences(before, now)
    if found and args.accept_data_change:
        logger.warning("other data than the checkpoint's, as accepted: %s", "; ".join(found))
    if not found or args.accept_data_change:
        return []
    return [
        f"the checkpoint in {args.load} was trained on other data: " + "; ".join(found) + ". Some "
        "samples would come twice and others never; restore the settings, start a new run from "
        "these weights (--finetune with another --run-dir), or continue with --accept-data-change"
    ]


def digest(prefix: Path) -> str:
    """12 hexadecimal digits for a pair's content: sizes, and 16 blocks of 16 KiB of each file.

    Not the path: data that has moved is the same data. An edit between the blocks goes unseen.
    """
    whole = hashlib.sha256()
    for path in pair(prefix):
        size = path.stat().st_size
        whole.update(f"{size} ".encode())
        with path.open("rb") as stream:
            for index in range(_BLOCKS):
                stream.seek(max(0, size - _BLOCK) * index // (_BLOCKS - 1))
                whole.update(stream.read(_BLOCK))
    return whole.hexdigest()[:12]


def _tokenizer(args: argparse.Namespace) -> str:
    """Type and content, wherever the files lie; of a folder ``tokenizer.json``, or all files."""
    names = (args.tokenizer_model, args.vocab_file, args.merge_file)
    paths = [Path(name) for name in names if name is not None]
    if not paths:
        return f"{args.tokenizer_type}, vocabulary {args.vocab_size}"
    files = []
    for path in paths:
        known = path / "tokenizer.json"
        whole = sorted(file for file in path.glob("*") if file.is_file())
        files += ([known] if known.is_file() else whole) if path.is_dir() else [path]
    content = hashlib.sha256()
    for file in files:
        content.update(file.read_bytes() if file.is_file() else str(file).encode())
    return f"{args.tokenizer_type} {content.hexdigest()[:12]}"


def _blend(blend: tuple[list[str], list[float] | None] | None) -> list[str]:
    if blend is None:
        return []
    prefixes, weights = blend
    shares: list[str] = [""] * len(prefixes)
    if weights is not None and len(prefixes) > 1:
        shares = [f"{weight / sum(weights):.6g} of " for weight in weights]
    return [share + digest(Path(prefix)) for share, prefix in zip(shares, prefixes, strict=True)]


def _passes(
    args: argparse.Namespace, blend: tuple[list[str], list[float] | None] | None, split: bool
) -> Iterator[str]:
    """How often each data set is passed over, which decides how Megatron shuffles it.

    A longer run reads the same beginning only while this stays the same: all passes are shuffled
    as one (``GPTDataset._build_document_sample_shuffle_indices``).
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        _get_size_per_split_per_dataset,
    )
    from megatron.core.datasets.utils import normalize

    prefixes, weights = blend or ([], None)
    total = args.train_samples or args.train_iters * args.global_batch_size
    sizes: list[int | None] = [None] * len(prefixes)
    if len(prefixes) == 1 and (weights is None or not split):
        sizes = [total]
    elif weights is not None:
        surplus = args.mid_level_dataset_surplus
        found = _get_size_per_split_per_dataset(normalize(weights), [total], surplus=surplus)
        sizes = [size for (size,) in found]
    for prefix, samples in zip(prefixes, sizes, strict=True):
        tokens = _training_tokens(Path(prefix), args.split if split else None)
        yield passes(tokens, samples, args.seq_length)


def passes(tokens: int, samples: int | None, length: int) -> str:
    """Passes over a data set, in the words of the identity.

    Args:
        tokens: of the data set.
        samples: asked of it; None for all, once.
        length: tokens of a sample; one more is read for the last label.
    """
    if samples is None or tokens < 2:
        return "1"
    epochs = max(1, -(-(samples * length + 1) // tokens))
    if epochs == 1:
        return "1"
    left = samples - ((epochs - 1) * tokens - 1) // length
    separate = left < int(_SEPARATE_BELOW * ((tokens - 1) // length))
    return f"{epochs}, the last apart" if separate else str(epochs)


def _training_tokens(prefix: Path, split: str | None) -> int:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))  # its end unmaps what it has handed out
    lengths = dataset.sequence_lengths
    if split is not None:
        bounds = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))[0]
        first, last = (round(bound * float(len(lengths))) for bound in bounds or (0.0, 0.0))
        lengths = lengths[first:last]
    return int(lengths.sum(dtype="int64"))


def _short(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        words = ", ".join(map(str, value[:4]))
        return f"[{words}{f', and {len(value) - 4} more' if len(value) > 4 else ''}]"
    return str(value)
