"""Megatron's token files (`.bin` and `.idx`): written in order and atomically, and checked.

Start-up is light: only `build_indexed` imports Megatron, for its writer.
"""

import os
import struct
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moa_megatron.data.tokenization import TextEncoder

_CHUNK_CHARS = 1 << 18
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
# Of upstream's DType, without the floating-point ones: nothing reads those as token ids.
_TOKEN_DTYPES = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}.items()
}
_FULL_SCAN_TOKENS = 1 << 26
_SAMPLE_BLOCKS, _SAMPLE_TOKENS = 256, 1 << 16


@dataclass(frozen=True)
class BuildReport:
    """What `build_indexed` wrote. `num_bytes` counts the UTF-8 text, `num_tokens` the file's."""

    prefix: Path
    num_documents: int
    num_tokens: int
    num_bytes: int


def pair(prefix: Path) -> tuple[Path, Path]:
    """The `.bin` and `.idx` of a prefix, which may itself contain dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text) + 1
        if size >= _CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _map_in_order[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Results in the order of `items`, at most a few items ahead of the consumer.

    Threads, not processes: encoding releases the GIL, costs no more CPU time than in forked
    processes, and leaves no orphans, re-imports or dead workers to wait for.
    """
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _published(prefix: Path) -> Iterator[tuple[Path, Path]]:
    """Temporary names for a pair, given their final ones on success: `.bin` first, `.idx` last.

    A reader needs both, so at no moment does a killed job leave a pair that looks complete. What
    it leaves are `PREFIX.*.partial` files, which nothing reads and anyone may delete.
    """
    stem = f"{prefix}.{uuid.uuid4().hex[:8]}"
    partial = Path(f"{stem}.bin.partial"), Path(f"{stem}.idx.partial")
    final_bin, final_idx = pair(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        for path in partial:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        final_idx.unlink(missing_ok=True)  # an older index must never meet the new data
        os.replace(partial[0], final_bin)
        os.replace(partial[1], final_idx)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def build_indexed(
    texts: Iterable[str], tokenizer_dir: Path, out_prefix: Path, workers: int = 2,
    progress: bool = True, *, append_eod: bool = True, total_bytes: int | None = None,
) -> BuildReport:  # fmt: skip
    """Tokenize documents into `OUT_PREFIX.bin` and `.idx`, in their order.

    The output has the same bytes for any number of `workers`. Nothing appears under the final
    names before everything is written (see `_published`). `total_bytes` scales the progress bar.

    Raises:
        ValueError: unusable tokenizer (see `TextEncoder`), or no documents.
        OSError: the files cannot be written; what was written is removed.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: must be at least 1")
    encoder = TextEncoder(tokenizer_dir, append_eod)
    # Late, for it takes seconds, and host mode must come before Megatron.
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    def encode(chunk: list[str]) -> list[tuple[np.ndarray, int]]:
        return [(encoder.encode(text), len(text.encode())) for text in chunk]

    num_documents = num_tokens = num_bytes = 0
    bar = tqdm(
        total=total_bytes, unit="B", unit_scale=True, desc=out_prefix.name, disable=not progress
    )
    with bar, _published(out_prefix) as (bin_path, idx_path):
        builder = IndexedDatasetBuilder(str(bin_path), DType.optimal_dtype(encoder.vocab_size))
        try:
            for encoded in _map_in_order(encode, _chunks(texts), workers):
                for ids, size in encoded:
                    builder.add_document(ids, [len(ids)])
                    num_documents += 1
                    num_tokens += len(ids)
                    num_bytes += size
                    bar.update(size)
        finally:
            builder.data_file.close()
        if not num_tokens:
            raise ValueError(f"documents: none for {out_prefix}; check the input paths and key")
        builder.finalize(str(idx_path))
    return BuildReport(out_prefix, num_documents, num_tokens, num_bytes)


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
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise ValueError(f"{idx_path}: not a Megatron index, it starts with {head[:9]!r}; {again}")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(head)
    if version != 1 or code not in _TOKEN_DTYPES:
        raise ValueError(f"{idx_path}: version {version}, dtype code {code} unknown; {again}")
    dtype = _TOKEN_DTYPES[code]
    expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if actual != expected or not num_sequences:
        raise ValueError(
            f"{idx_path}: {actual:,} bytes, {expected:,} needed for {num_sequences:,} sequences "
            f"and {num_bounds:,} document bounds; {again}"
        )
    index = np.memmap(idx_path, dtype=np.uint8, mode="r", offset=_HEADER.size)
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
