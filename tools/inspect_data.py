#!/usr/bin/env python3
"""Look into token files: counts, document lengths, texts, and whether .bin and .idx are whole.

Every length, offset and token is read, in blocks. Exit code 0: sane, 78: damaged or not there.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from moa_megatron.data.checking import Index, check_prefix
from moa_megatron.data.token_files import pair
from moa_megatron.recipes import Parser

EXIT_INPUT = 78
BLOCK = 1 << 20
BAR = 40

EXAMPLES = """examples:
  tools/inspect_data.py data/web-train data/web-valid
  tools/inspect_data.py data/web-train --tokenizer data/web-tokenizer --show 3
  tools/inspect_data.py data/web-train --checksum --json
"""


@dataclasses.dataclass
class Facts:
    """What a pair holds; `lengths` counts documents with [2^k, 2^(k+1)) tokens, by k from 0."""

    prefix: str
    documents: int
    tokens: int
    dtype: str
    low_id: int
    high_id: int
    shortest: int
    longest: int
    lengths: list[int]
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)


def inspect(prefix: Path, vocab_size: int, checksum: bool) -> Facts:
    """Everything but texts.

    Raises:
        ValueError: the pair is missing, damaged, or has ids beyond the vocabulary.
    """
    check_prefix(prefix, vocab_size)  # quick, and with the fix in every message
    index = Index(prefix)
    num_tokens = index.check()
    low, high = index.id_range(num_tokens, sampled=False)
    if high >= vocab_size:
        raise ValueError(f"data prefix {prefix}: token id {high}, the vocabulary has {vocab_size}")
    histogram = np.zeros(64, np.int64)
    shortest, longest = num_tokens, 0
    for lengths in document_lengths(index):
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
        kinds = np.log2(np.maximum(lengths, 1)).astype(int)
        histogram += np.bincount(kinds, minlength=64)
    used = histogram.nonzero()[0].max() + 1
    sums = {path.name: sha256(path) for path in pair(prefix)} if checksum else {}
    return Facts(
        str(prefix), index.num_bounds - 1, num_tokens, str(index.dtype), low, high, shortest,
        longest, histogram[:used].tolist(), sums,
    )  # fmt: skip


def document_lengths(index: Index) -> Iterator[np.ndarray]:
    """Tokens of each document, in blocks."""
    itemsize, end = index.dtype.itemsize, index.bin_path.stat().st_size
    for start in range(0, index.num_bounds - 1, BLOCK):
        bounds = index.bounds(start, BLOCK + 1)
        first, last = int(bounds[0]), int(bounds[-1])
        starts = np.append(index.pointers(first, last - first), end)
        if last < index.num_sequences:
            starts[-1] = index.pointers(last, 1)[0]
        yield np.diff(starts[bounds - first]) // itemsize


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    size = path.stat().st_size
    with (
        path.open("rb") as stream,
        tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar,
    ):
        while block := stream.read(8 * BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def describe(facts: Facts) -> list[str]:
    mean = facts.tokens / facts.documents
    lines = [
        f"{facts.prefix}: {facts.documents:,} documents, {facts.tokens:,} tokens of {facts.dtype}, "
        f"ids {facts.low_id:,} to {facts.high_id:,}",
        f"  tokens a document: {facts.shortest:,} to {facts.longest:,}, mean {mean:,.1f}",
    ]
    most = max(facts.lengths)
    for power, count in enumerate(facts.lengths):
        bar = "#" * (-(-count * BAR // most))
        lines.append(
            f"  {2**power:>13,} to {2 ** (power + 1) - 1:<13,} {count:>13,} {bar}".rstrip()
        )
    return lines + [f"  sha256 {digest}  {name}" for name, digest in facts.sha256.items()]


def texts(
    prefix: Path, tokenizer: Tokenizer | None, numbers: Sequence[int]
) -> list[dict[str, Any]]:
    """Ids, and text where there is a tokenizer, of the documents asked for."""
    found: list[dict[str, Any]] = []
    index = Index(prefix)
    for number in numbers:
        if not 0 <= number < index.num_bounds - 1:
            raise ValueError(
                f"--document {number}: {prefix} has {index.num_bounds - 1:,}, counted from 0"
            )
        ids = index.document(number).tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else None
        found.append({"document": number, "ids": ids, "text": text})
    return found


def draw(all_facts: Sequence[Facts], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    for facts in all_facts:
        edges = [2**power for power in range(len(facts.lengths) + 1)]
        axes.stairs(facts.lengths, edges, label=facts.prefix)
    axes.set(xscale="log", xlabel="tokens a document", ylabel="documents")
    axes.legend()
    figure.savefig(path)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("prefixes", nargs="+", type=Path, metavar="PREFIX", help="path without .bin and .idx")
    add("--tokenizer", type=Path, metavar="DIR", help="decode, and check ids against its size")
    add("--show", type=int, default=0, metavar="N", help="N documents, evenly spaced")
    add("--document", type=int, metavar="I", help="document I, counted from 0")
    add("--checksum", action="store_true", help="sha256 of both files")
    add("--plot", type=Path, metavar="PNG", help="the lengths as a picture")
    add("--json", action="store_true", help="one JSON object a prefix instead of text")
    return parser.parse_args()


def read_tokenizer(folder: Path) -> Tokenizer:
    """Raises ValueError for a folder without a tokenizer.json that can be loaded."""
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise ValueError(
            f"--tokenizer {folder}: {path.name} cannot be loaded ({error}); give the folder that "
            "prepare_data.py named"
        ) from error


def main() -> int:
    tokenizer, all_facts, failed = None, [], False
    try:
        args = parse_arguments()
        if args.tokenizer is not None:
            tokenizer = read_tokenizer(args.tokenizer)
    except (OSError, ValueError) as error:
        print(f"inspect_data: refused\n{error}", file=sys.stderr)
        return EXIT_INPUT
    vocab_size = tokenizer.get_vocab_size() if tokenizer else 2**31
    for prefix in args.prefixes:
        try:
            facts = inspect(prefix, vocab_size, args.checksum)
            count = min(args.show, facts.documents)
            numbers = [facts.documents * i // count for i in range(count)]
            numbers += [] if args.document is None else [args.document]
            shown = texts(prefix, tokenizer, numbers)
        except (ValueError, OSError) as error:
            print(f"inspect_data: {error}", file=sys.stderr)
            failed = True
            continue
        all_facts.append(facts)
        if args.json:
            print(json.dumps({**dataclasses.asdict(facts), "shown": shown}))
            continue
        print("\n".join(describe(facts)))
        for found in shown:
            print(f"  document {found['document']:,}, {len(found['ids']):,} tokens")
            print(f"    {found['text'] if tokenizer else found['ids']!r}")
    if args.plot and all_facts:
        draw(all_facts, args.plot)
    return EXIT_INPUT if failed else 0


if __name__ == "__main__":
    sys.exit(main())
