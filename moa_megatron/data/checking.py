"""Whether a pair of token files is whole and fits a vocabulary."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moa_megatron.data.token_files import HEADER, MAGIC, TOKEN_DTYPES, pair

_FULL_SCAN_TOKENS = 1 << 26
_SAMPLE_BLOCKS, _SAMPLE_TOKENS = 256, 1 << 16
_BLOCK = 1 << 20
_AGAIN = "the file is damaged or was not written as text tokens; prepare the data again"


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
    index = Index(prefix)
    num_tokens = index.check()
    low, high = index.id_range(num_tokens, sampled=num_tokens > _FULL_SCAN_TOKENS)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"data prefix {prefix}: token ids reach from {low} to {high}, the vocabulary has "
            f"{vocab_size} (0 to {vocab_size - 1}); train with the tokenizer that made the data, "
            "and without a smaller --vocab-size"
        )
    return num_tokens


class Index:
    """The `.idx` of a prefix, read in blocks: memory does not grow with the number of documents.

    Raises:
        ValueError: the header is foreign, or the file's size is not the one it implies.
    """

    def __init__(self, prefix: Path) -> None:
        self.bin_path, self.idx_path = pair(prefix)
        actual = self.idx_path.stat().st_size
        with self.idx_path.open("rb") as stream:
            head = stream.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise ValueError(
                f"{self.idx_path}: not a Megatron index, it starts with {head[:9]!r}; {_AGAIN}"
            )
        _, version, code, self.num_sequences, self.num_bounds = HEADER.unpack(head)
        if version != 1 or code not in TOKEN_DTYPES:
            raise ValueError(
                f"{self.idx_path}: version {version}, dtype code {code} unknown; {_AGAIN}"
            )
        self.dtype = TOKEN_DTYPES[code]
        expected = HEADER.size + 12 * self.num_sequences + 8 * self.num_bounds
        if actual != expected or not self.num_sequences:
            raise ValueError(
                f"{self.idx_path}: {actual:,} bytes, {expected:,} needed for "
                f"{self.num_sequences:,} sequences and {self.num_bounds:,} document bounds; "
                f"{_AGAIN}"
            )

    def lengths(self, start: int, count: int) -> np.ndarray:
        """Tokens of the sequences from `start` on, at most `count` of them."""
        return self._read("<i4", 0, start, min(count, self.num_sequences - start))

    def pointers(self, start: int, count: int) -> np.ndarray:
        """First bytes of those sequences in the `.bin`."""
        count = min(count, self.num_sequences - start)
        return self._read("<i8", 4 * self.num_sequences, start, count)

    def bounds(self, start: int, count: int) -> np.ndarray:
        """First sequences of the documents from `start` on; the last bound ends the last one."""
        count = min(count, self.num_bounds - start)
        return self._read("<i8", 12 * self.num_sequences, start, count)

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Token ids, counted from the beginning of the `.bin`."""
        offset = start * self.dtype.itemsize
        return np.fromfile(self.bin_path, dtype=self.dtype, count=count, offset=offset)

    def document(self, number: int) -> np.ndarray:
        """Token ids of a document; all its sequences."""
        first, last = self.bounds(number, 2).tolist()
        count = int(self.lengths(first, last - first).sum(dtype=np.int64))
        start = int(self.pointers(first, 1)[0]) if count else 0
        return self.tokens(start // self.dtype.itemsize, count)

    def _read(self, dtype: str, offset: int, start: int, count: int) -> np.ndarray:
        offset += HEADER.size + start * np.dtype(dtype).itemsize
        return np.fromfile(self.idx_path, dtype=dtype, count=count, offset=offset)

    def check(self) -> int:
        """Every length, offset and bound, and the size of the `.bin`; the number of tokens.

        Raises:
            ValueError: they contradict each other.
        """
        num_tokens, consistent = 0, True
        for start in range(0, self.num_sequences, _BLOCK):
            lengths = self.lengths(start, _BLOCK).astype(np.int64)
            ends = np.cumsum(lengths) + num_tokens
            starts = self.pointers(start, _BLOCK)
            consistent &= bool(
                (lengths >= 0).all() and (starts == (ends - lengths) * self.dtype.itemsize).all()
            )
            num_tokens = int(ends[-1])
        bounds, last = self.bounds(0, 1), 0
        consistent &= self.num_bounds >= 2 and bounds[0] == 0
        for start in range(0, self.num_bounds, _BLOCK):
            bounds = self.bounds(start, _BLOCK)
            consistent &= bool(bounds[0] >= last and (np.diff(bounds) >= 0).all())
            last = int(bounds[-1])
        if not consistent or not num_tokens or last != self.num_sequences:
            raise ValueError(f"{self.idx_path}: inconsistent lengths, offsets or bounds; {_AGAIN}")
        size, needed = self.bin_path.stat().st_size, num_tokens * self.dtype.itemsize
        if size != needed:
            raise ValueError(
                f"{self.bin_path}: {size:,} bytes, but {self.idx_path.name} describes "
                f"{num_tokens:,} tokens of {self.dtype.itemsize} bytes, {needed:,} bytes; one of "
                "them is cut or belongs to other data: prepare the data again"
            )
        return num_tokens

    def id_range(self, num_tokens: int, sampled: bool) -> tuple[int, int]:
        """Lowest and highest id: of all tokens, or of evenly spaced blocks, both ends included."""
        starts: Iterable[int] = range(0, num_tokens, _SAMPLE_TOKENS)
        if sampled:
            starts = np.linspace(0, num_tokens - _SAMPLE_TOKENS, _SAMPLE_BLOCKS).astype(int)
        extremes = []
        for start in starts:
            block = self.tokens(int(start), _SAMPLE_TOKENS)
            extremes.append((int(block.min()), int(block.max())))
        return min(low for low, _ in extremes), max(high for _, high in extremes)
