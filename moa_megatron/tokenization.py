"""Byte-level BPE tokenizers, and Megatron's token files (`.bin` and `.idx`): written, checked.

Start-up is light: only `build_indexed` imports Megatron, for its writer.
"""

import json
import logging
import os
import re
import struct
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

logger = logging.getLogger(__name__)

END_OF_DOCUMENT = "<|endoftext|>"
# Megatron pads samples with the pad token and masks its loss: without one it crashes on a padded
# sample, and with the end of document in its place it warns at every start (megatron_dataset.py).
PADDING = "<|pad|>"
MIN_VOCAB_SIZE = 256 + 2  # every byte, and the two special tokens

_CHUNK_CHARS = 1 << 18
_PIECE_CHARS = 1 << 20
# A byte-level pre-token never spans these positions: a new one starts at a single space or newline
# between two visible characters. \S is narrower here than in the tokenizer's regex, so it is safe.
_CUT = re.compile(r"(?<=\S)(?=[ \n]\S)")

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


def write_text(path: Path, text: str) -> None:
    """Write a small file so that readers see the old one or the new one, never a part."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_dir: Path) -> int:
    """Train a byte-level BPE and write it where `--tokenizer-model OUT_DIR` finds it, offline.

    The same texts in the same order give the same bytes, whatever the number of threads.

    Returns:
        The vocabulary's size, special tokens included: `vocab_size`, or fewer for little text.

    Raises:
        ValueError: `vocab_size` cannot hold all bytes, or there is no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size}: must be at least {MIN_VOCAB_SIZE}, "
            "for 256 bytes and 2 special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    num_texts = 0

    def counted() -> Iterator[str]:
        nonlocal num_texts
        for text in texts:
            num_texts += 1
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not num_texts:
        raise ValueError("documents: none to train a tokenizer on; check the input paths and key")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    write_text(out_dir / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(out_dir / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    actual: int = tokenizer.get_vocab_size()
    if actual < vocab_size:
        logger.warning(
            "vocab_size=%d asked for, %d found: the text has no more pairs to merge",
            vocab_size, actual,
        )  # fmt: skip
    return actual


class TextEncoder:
    """A Hugging Face tokenizer folder, encoding as Megatron's HuggingFaceTokenizer does.

    One difference, on purpose: a document that spells out a special token's name gets ordinary
    tokens for it, so that no text can end a document.

    Raises:
        ValueError: the folder has no loadable `tokenizer.json`, or names no end-of-document token.
    """

    def __init__(self, tokenizer_dir: Path, append_eod: bool = True) -> None:
        path = tokenizer_dir / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception for a malformed file
            raise ValueError(
                f"tokenizer={tokenizer_dir}: tokenizer.json cannot be loaded ({error}); give a "
                "folder written by transformers' save_pretrained or by --train-tokenizer"
            ) from error
        # A stored truncation would silently cut documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.eod = self._find_eod(tokenizer_dir) if append_eod else None
        self._may_cut = self._cuts_are_exact()

    def _find_eod(self, tokenizer_dir: Path) -> int:
        """The id of `eos_token`, which Megatron takes for the end of a document."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = tokenizer_dir / name
            if not path.is_file():
                continue
            token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
            if isinstance(token, dict):
                token = token.get("content")
            if token is not None:
                eod: int | None = self._tokenizer.token_to_id(token)
                if eod is None:
                    raise ValueError(f"tokenizer={tokenizer_dir}: eos_token {token!r} has no id")
                return eod
        raise ValueError(
            f"tokenizer={tokenizer_dir}: no eos_token in tokenizer_config.json to end documents "
            "with; add one, or pass --no-append-eod"
        )

    def _cuts_are_exact(self) -> bool:
        """Whether `_CUT` never changes the ids: true for the tokenizers trained here."""
        state = json.loads(self._tokenizer.to_str())
        splitter = state["pre_tokenizer"] or {}
        return (
            state["normalizer"] is None
            and state["post_processor"] is None
            and splitter.get("type") == "ByteLevel"
            and splitter.get("use_regex") is True
            and not splitter.get("add_prefix_space")
            and all(token["special"] for token in state["added_tokens"])
        )

    def encode(self, text: str) -> np.ndarray:
        """Ids of one document, with the end of document where asked for.

        Large texts are encoded in pieces where that is exact: the encoder itself takes about 180
        bytes of memory a character (tokenizers 0.23, measured on 50 MB of source).
        """
        pieces = _pieces(text) if self._may_cut else [text]
        # The batch call releases the GIL and skips the offsets; encode() does neither.
        ids = [self._tokenizer.encode_batch_fast([piece])[0].ids for piece in pieces]
        if self.eod is not None and not (ids[-1] and ids[-1][-1] == self.eod):
            ids.append([self.eod])
        array = np.concatenate([np.array(part, dtype=np.int64) for part in ids])
        if array.size and array.max() >= self.vocab_size:
            raise ValueError(
                f"tokenizer: gives id {array.max()} with a vocabulary of {self.vocab_size}; "
                "its ids have gaps, and a model of that vocabulary cannot embed them"
            )
        return array


def _pieces(text: str) -> list[str]:
    pieces, start = [], 0
    while len(text) - start > _PIECE_CHARS and (
        cut := _CUT.search(text, start + _PIECE_CHARS)
    ):  # fmt: skip
        pieces.append(text[start : cut.start()])
        start = cut.start()
    return [*pieces, text[start:]]


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
