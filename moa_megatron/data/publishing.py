"""Finished parts to what Megatron reads: pairs, blend files and a manifest beside them.

Everything is written beside the parts first and then moved, so that older output stays whole until
its successor is, and a kill at any moment leaves something that the same command finishes.
`PREFIX.manifest.json` says which pairs belong together, how many tokens each has and which
tokenizer made them; `blends.blend` joins manifests to the file of one run.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moa_megatron.data.parts import TOKENIZER_FILES, Record, Workplace
from moa_megatron.data.token_files import Piece, join, pair
from moa_megatron.data.tokenization import write_text

SPLITS = ("train", "valid", "test")
# Bytes of English text to a token, and of text to a compressed byte: for an estimate.
_TEXT_PER_TOKEN, _TEXT_PER_PACKED = 4, 3.5


@dataclass(frozen=True)
class Published:
    """A pair as the manifest lists it; `prefix` is relative to the manifest's folder."""

    prefix: str
    documents: int
    tokens: int


def manifest_path(prefix: Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def blend_paths(prefix: Path) -> tuple[Path, Path]:
    """The lists of several pairs: of unsplit data, and by split."""
    return Path(f"{prefix}.blend.txt"), Path(f"{prefix}.blend.json")


def tokenizer_path(prefix: Path) -> Path:
    """Where a tokenizer that is trained for this output goes."""
    return Path(f"{prefix}-tokenizer")


def check_space(folder: Path, text_bytes: int, packed_bytes: int, itemsize: int) -> str | None:
    """A warning where the estimate does not fit; OSError where not even half of it does.

    Parts and published pairs exist together, so every token is counted twice.
    """
    text = text_bytes + packed_bytes * _TEXT_PER_PACKED
    needed = int(2 * itemsize * text / _TEXT_PER_TOKEN)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    message = f"{folder}: {free:,} bytes free, about {needed:,} needed for parts and output"
    if free < needed // 2:
        raise OSError(f"{message}; free space or give another --output")
    return message if free < needed else None


@dataclass(frozen=True)
class Publication:
    """One output: where it goes, and what decides its files."""

    prefix: Path
    splits: tuple[str, ...]
    dtype: np.dtype
    vocab_size: int
    tokenizer_sha256: str
    shard_tokens: int | None = None
    held_out: float = 0.0
    trained: Path | None = None  # the folder of a tokenizer that is published with its pairs

    def path(self, split: str) -> Path:
        return Path(f"{self.prefix}-{split}") if split else self.prefix


def publish(
    workplace: Workplace, records: Sequence[Record], output: Publication
) -> dict[str, list[Published]]:
    """Write everything beside the parts, then give it its names, with the manifest last.

    With ``shard_tokens`` pairs are `PREFIX-00000`, ... of that many tokens each. A shard ends with
    the document that fills it, so the shards are the same for any parts.

    Raises:
        ValueError: a split has no documents.
        OSError: the files cannot be written; older output is kept.
    """
    staged = workplace.folder / "ready"
    shutil.rmtree(staged, ignore_errors=True)
    splits = {split: _write(workplace, records, split, output, staged) for split in output.splits}
    _write_blend(output, splits, staged)
    if output.trained:
        shutil.copytree(output.trained, staged / tokenizer_path(output.prefix).name)
    state = {
        "tokenizer_sha256": output.tokenizer_sha256,
        "vocab_size": output.vocab_size,
        "splits": {name: [asdict(item) for item in found] for name, found in splits.items()},
    }
    write_text(staged / manifest_path(output.prefix).name, json.dumps(state, indent=1) + "\n")
    _replace(output, [item.prefix for found in splits.values() for item in found], staged)
    return splits


def _replace(output: Publication, names: Sequence[str], staged: Path) -> None:
    """Give the staged files their names in an order that a kill cannot make a mixture of.

    No older pair has an index any more when the first new one gets its own, and the older manifest
    goes after its pairs, so that a repetition finds those that it still has to remove.
    """
    folder, tokenizer = output.prefix.parent, tokenizer_path(output.prefix)
    if output.trained:
        tokenizer.mkdir(exist_ok=True)
    for name in sorted(_listed(output.prefix).union(names)):
        old_bin, old_idx = pair(folder / name)
        old_idx.unlink(missing_ok=True)
        if name not in names:
            old_bin.unlink(missing_ok=True)
    for path in (*blend_paths(output.prefix), manifest_path(output.prefix)):
        path.unlink(missing_ok=True)
    if output.trained:
        for file in TOKENIZER_FILES:
            (tokenizer / file).unlink(missing_ok=True)
        for path in (staged / tokenizer.name).iterdir():
            os.replace(path, tokenizer / path.name)
    for name in names:
        for new, final in zip(pair(staged / name), pair(folder / name), strict=True):
            os.replace(new, final)
    for path in (*blend_paths(output.prefix), manifest_path(output.prefix)):
        if (staged / path.name).exists():
            os.replace(staged / path.name, path)


def _write(
    workplace: Workplace, records: Sequence[Record], split: str, output: Publication, folder: Path
) -> list[Published]:
    """The pairs of one split, in a folder beside the parts."""
    if not any(record.tokens[split] for record in records):
        total = sum(sum(record.documents.values()) for record in records)
        if not total:
            raise ValueError(f"documents: none for {output.prefix}; check the input paths and key")
        raise ValueError(
            f"--split-valid {output.held_out}: none of the {total:,} documents fell into "
            f"{output.path(split).name}; give a fraction such as {min(0.5, 10 / total):.2g} and "
            "pass --overwrite"
        )
    shards = _shards(workplace, records, split, output.dtype.itemsize, output.shard_tokens)
    name = output.path(split).name
    names = [name]
    if output.shard_tokens:
        names = [f"{name}-{number:05d}" for number in range(len(shards))]
    found = []
    for name, pieces in zip(names, shards, strict=True):
        join(pieces, folder / name, output.dtype)
        num_documents = sum(piece.last - piece.first for piece in pieces)
        tokens = sum(piece.stop - piece.start for piece in pieces) // output.dtype.itemsize
        found.append(Published(name, num_documents, tokens))
    return found


def _listed(prefix: Path) -> set[str]:
    """Pairs that the manifest of an older publication names."""
    try:
        splits = json.loads(manifest_path(prefix).read_text(encoding="utf-8"))["splits"]
        return {item["prefix"] for found in splits.values() for item in found}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()  # none, or a file of somebody else's


def _shards(
    workplace: Workplace, records: Sequence[Record], split: str, itemsize: int, limit: int | None
) -> list[list[Piece]]:
    """The pieces of each shard; a shard is full once it has at least `limit` tokens."""
    shards: list[list[Piece]] = [[]]
    filled = 0
    for number, record in enumerate(records):
        data, lengths = (workplace.path(number, split, kind) for kind in ("tokens", "lengths"))
        ends = np.empty(0, np.int64)
        if limit and record.documents[split]:
            ends = np.cumsum(np.fromfile(lengths, dtype="<i4"), dtype=np.int64)
        first, start = 0, 0  # in documents, in tokens
        while first < record.documents[split]:
            last, stop = record.documents[split], record.tokens[split]
            if limit:
                full = int(np.searchsorted(ends, start + limit - filled)) + 1
                last = min(full, last)
                stop = int(ends[last - 1])
            shards[-1].append(Piece(data, lengths, start * itemsize, stop * itemsize, first, last))
            filled += stop - start
            first, start = last, stop
            if limit and filled >= limit:
                shards.append([])
                filled = 0
    return shards if shards[-1] else shards[:-1]


def weigh(prefix: Path, found: Sequence[Published], weight: float = 1.0) -> list[str]:
    """``weight path weight path ...`` as Megatron reads it, paths absolute."""
    total = sum(item.tokens for item in found)
    folder = prefix.absolute().parent
    return [
        word
        for item in found
        for word in (f"{weight * item.tokens / total:.9g}", str(folder / item.prefix))
    ]


def _write_blend(output: Publication, splits: dict[str, list[Published]], folder: Path) -> None:
    if all(len(found) == 1 for found in splits.values()):
        return
    words = {split: weigh(output.prefix, found) for split, found in splits.items()}
    whole, by_split = blend_paths(output.prefix)
    if "" in words:
        write_text(folder / whole.name, " ".join(words[""]) + "\n")
    else:
        lists = {split: words.get(split) for split in SPLITS}
        write_text(folder / by_split.name, json.dumps(lists, indent=1) + "\n")


def data_flags(output: Publication, splits: dict[str, list[Published]]) -> dict[str, Path]:
    """Megatron's flags for what has been published."""
    if all(len(found) == 1 for found in splits.values()):
        return {
            f"--{split}-data-path" if split else "--data-path": output.path(split)
            for split in sorted(splits)
        }
    whole, by_split = blend_paths(output.prefix)
    if "" in splits:
        return {"--data-args-path": whole}
    return {"--per-split-data-args-path": by_split}
