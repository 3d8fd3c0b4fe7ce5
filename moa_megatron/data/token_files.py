"""Megatron's token files (`.bin` and `.idx`): written in order and atomically.

Megatron's own writer keeps every document's length in a Python list, some 40 bytes each, and its
import takes seconds; the format is a header, the lengths, their offsets and the document bounds.
"""

import os
import struct
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from moa_megatron.data.encoding import TextEncoder

_CHUNK_CHARS = 1 << 18
_BLOCK = 1 << 20  # lengths, pointers and bytes go through memory in blocks
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
# Of upstream's DType, without the floating-point ones: nothing reads those as token ids.
TOKEN_DTYPES = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}.items()
}
_UINT16_BELOW = 65_500  # where upstream's DType.optimal_dtype changes


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


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that Megatron gives the ids of a vocabulary: uint16 below 65,500, else int32."""
    return TOKEN_DTYPES[8 if vocab_size < _UINT16_BELOW else 4]


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
def published(prefix: Path) -> Iterator[tuple[Path, Path]]:
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


@dataclass(frozen=True)
class Piece:
    """Documents in token order: bytes [start, stop) of `data`, lengths [first, last) of `lengths`.

    `lengths` is a file of int32, one a document, in tokens.
    """

    data: Path
    lengths: Path
    start: int
    stop: int
    first: int
    last: int


def join(pieces: Sequence[Piece], prefix: Path, dtype: np.dtype) -> None:
    """Write the documents of all pieces as one pair, with flat memory, and publish it.

    Raises:
        OSError: the files cannot be written; what was written is removed, an older pair kept.
    """
    with published(prefix) as (bin_path, idx_path):
        with bin_path.open("wb") as out:
            for piece in pieces:
                _append(out, piece)
        with idx_path.open("wb", buffering=_BLOCK) as out:
            num_documents = sum(piece.last - piece.first for piece in pieces)
            code = next(code for code, known in TOKEN_DTYPES.items() if known == dtype)
            out.write(HEADER.pack(MAGIC, 1, code, num_documents, num_documents + 1))
            for block in _lengths(pieces):
                out.write(block.tobytes())
            offset = 0
            for block in _lengths(pieces):
                ends = np.cumsum(block, dtype="<i8") * dtype.itemsize + offset
                out.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
                offset = int(ends[-1])
            for start in range(0, num_documents + 1, _BLOCK):
                stop = min(start + _BLOCK, num_documents + 1)
                out.write(np.arange(start, stop, dtype="<i8").tobytes())


def _append(out: BinaryIO, piece: Piece) -> None:
    with piece.data.open("rb") as stream:
        stream.seek(piece.start)
        left = piece.stop - piece.start
        while left:
            block = stream.read(min(left, 8 * _BLOCK))
            if not block:
                raise ValueError(f"{piece.data}: shorter than its record; prepare the data again")
            out.write(block)
            left -= len(block)


def _lengths(pieces: Sequence[Piece]) -> Iterator[np.ndarray]:
    for piece in pieces:
        for start in range(piece.first, piece.last, _BLOCK):
            count = min(_BLOCK, piece.last - start)
            yield np.fromfile(piece.lengths, dtype="<i4", count=count, offset=4 * start)


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
    dtype = token_dtype(encoder.vocab_size)

    def encode(chunk: list[str]) -> tuple[np.ndarray, np.ndarray, int]:
        return *encoder.encode_all(chunk), sum(len(text.encode()) for text in chunk)

    num_tokens = num_bytes = num_documents = 0
    bar = tqdm(
        total=total_bytes, unit="B", unit_scale=True, desc=out_prefix.name, disable=not progress
    )
    out_prefix.parent.mkdir(parents=True, exist_ok=True)
    with bar, TemporaryDirectory(prefix=f".{out_prefix.name}.", dir=out_prefix.parent) as folder:
        data, lengths = Path(folder, "tokens"), Path(folder, "lengths")
        with data.open("wb") as tokens_out, lengths.open("wb") as lengths_out:
            for ids, counts, size in _map_in_order(encode, _chunks(texts), workers):
                tokens_out.write(ids.astype(dtype).tobytes())
                lengths_out.write(counts.tobytes())
                num_documents += len(counts)
                num_tokens += len(ids)
                num_bytes += size
                bar.update(size)
        if not num_tokens:
            raise ValueError(f"documents: none for {out_prefix}; check the input paths and key")
        piece = Piece(data, lengths, 0, num_tokens * dtype.itemsize, 0, num_documents)
        join([piece], out_prefix, dtype)
    return BuildReport(out_prefix, num_documents, num_tokens, num_bytes)
