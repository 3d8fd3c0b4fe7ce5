"""Whether a pair of token files is whole and fits a vocabulary."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moa_megatron.data.token_files import HEADER, MAGIC, TOKEN_DTYPES, pair

_FULL_SCAN_TOKENS = 1 << 26
_SAMPLE_BLOCKS, _SAMPLE_TOKENS = 256, 1 << 16


def check_prefix(prefix: Path, vocab_size: int) -> int:
    """Count a pair's tokens; refuse one that would fail, or train on wrong ids, later.

    The index is checked in full. Token ids are checked in full up to 2^26 tokens, beyond that in
    256 evenly spaced blocks of 65,536, first and last tokens included.

    Raises:
        ValueError: a file is missing, foreign, or cut; or an id does not fit `vocab_size`.
    """
    bin_path, idx_path = pair(prefix)
    missing = [str(path) for path in (bin_path, idx_path) if not path.is_file()]
    if missing:
        raise ValueError(
            f"data prefix {prefix}: no file {' and no file '.join(missing)}; give the path without "
            ".bin or .idx, or prepare the data again (a killed run leaves no complete pair)"
        )
    dtype, num_tokens = _read_index(bin_path, idx_path)
    tokens = np.memmap(bin_path, dtype=dtype, mode="r", shape=(num_tokens,))
    starts: Iterable[int] = range(0, num_tokens, _SAMPLE_TOKENS)
    if num_tokens > _FULL_SCAN_TOKENS:
        starts = np.linspace(0, num_tokens - _SAMPLE_TOKENS, _SAMPLE_BLOCKS, dtype=np.int64)
    blocks = [tokens[start : start + _SAMPLE_TOKENS] for start in starts]
    low, high = int(min(map(np.min, blocks))), int(max(map(np.max, blocks)))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"data prefix {prefix}: token ids reach from {low} to {high}, the vocabulary has "
            f"{vocab_size} (0 to {vocab_size - 1}); train with the tokenizer that made the data"
        )
    return num_tokens


def _read_index(bin_path: Path, idx_path: Path) -> tuple[np.dtype, int]:
    """The token dtype and count, after every check that needs no tokens."""
    again = "the file is damaged or was not written as text tokens; prepare the data again"
    actual = idx_path.stat().st_size
    with idx_path.open("rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{idx_path}: not a Megatron index, it starts with {head[:9]!r}; {again}")
    _, version, code, num_sequences, num_bounds = HEADER.unpack(head)
    if version != 1 or code not in TOKEN_DTYPES:
        raise ValueError(f"{idx_path}: version {version}, dtype code {code} unknown; {again}")
    dtype = TOKEN_DTYPES[code]
    expected = HEADER.size + 12 * num_sequences + 8 * num_bounds
    if actual != expected or not num_sequences:
        raise ValueError(
            f"{idx_path}: {actual:,} bytes, {expected:,} needed for {num_sequences:,} sequences "
            f"and {num_bounds:,} document bounds; {again}"
        )
    index = np.memmap(idx_path, dtype=np.uint8, mode="r", offset=HEADER.size)
    lengths = index[: 4 * num_sequences].view(np.int32)
    bounds = index[12 * num_sequences :].view(np.int64)
    num_tokens = int(lengths.sum(dtype=np.int64))
    pointers = index[4 * num_sequences : 12 * num_sequences].view(np.int64)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if (
        not num_tokens or (lengths < 0).any()
        or pointers[0] != 0 or (pointers[1:] != ends[:-1]).any()
        or bounds.size < 2 or bounds[0] != 0 or bounds[-1] != num_sequences
        or (np.diff(bounds) < 0).any()
    ):  # fmt: skip
        raise ValueError(f"{idx_path}: inconsistent lengths, offsets or bounds; {again}")
    size = bin_path.stat().st_size
    if size != num_tokens * dtype.itemsize:
        raise ValueError(
            f"{bin_path}: {size:,} bytes, but {idx_path.name} describes {num_tokens:,} tokens of "
            f"{dtype.itemsize} bytes, {num_tokens * dtype.itemsize:,} bytes; one of them is "
            "cut or belongs to other data: prepare the data again"
        )
    return dtype, num_tokens
