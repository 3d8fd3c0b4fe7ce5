#!/usr/bin/env python3
"""Turn text into the token files Megatron trains on, and say what was left out.

Inputs are .jsonl files (one document a line), .txt files (one document each) and folders (one
document for each file with --suffix). Lines that hold no text are skipped, counted and located.
"""

import argparse
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from moa_megatron.data import corpus, documents, inputs
from moa_megatron.data.token_files import BuildReport, build_indexed, pair
from moa_megatron.data.tokenization import MIN_VOCAB_SIZE, TextEncoder, train_tokenizer

EXIT_STORAGE, EXIT_INPUT = 74, 78

EXAMPLES = """examples:
  # the standard library's source, tokenizer included: data for a first run
  tools/prepare_data.py --stdlib

  # own text, own tokenizer, 5 % of the documents held out
  tools/prepare_data.py books.jsonl notes.txt src/ --output data/mine \\
      --train-tokenizer 8192 --split-valid 0.05 --workers 8
"""


class Parser(argparse.ArgumentParser):
    """argparse leaves with 2, which no launcher of ours knows."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_INPUT, f"{self.prog}: {message}; see --help\n")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="INPUT", help=".jsonl, .txt, or a folder")
    add("--stdlib", action="store_true", help="prepare Python's own library instead of INPUT")
    add(
        "--output",
        type=Path,
        metavar="PREFIX",
        help="write PREFIX.bin and PREFIX.idx; with --stdlib the cache folder (default: data)",
    )
    add("--tokenizer", type=Path, metavar="DIR", help="folder with tokenizer.json")
    add(
        "--train-tokenizer",
        type=int,
        metavar="VOCAB",
        help="train a byte-level BPE into PREFIX-tokenizer (with --stdlib: default 4096)",
    )
    add("--json-key", default="text", help="key of the text in .jsonl lines (default: text)")
    add(
        "--suffix",
        action="append",
        metavar=".EXT",
        help="files to read in folders; may be repeated (default: .py)",
    )
    add(
        "--split-valid",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="hold out documents by hash: writes PREFIX-train and PREFIX-valid (default: 0)",
    )
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="tokenizing threads (default: the cores this process may use)",
    )
    add("--strict", action="store_true", help="refuse input with bad lines instead of skipping")
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's eos_token (default: yes)",
    )
    add("--overwrite", action="store_true", help="replace existing output")
    return parser.parse_args(argv)  # fmt: skip


def output_prefixes(args: argparse.Namespace) -> dict[str, Path]:
    """Prefix by split; the one of an unsplit run has the empty name."""
    if not args.split_valid:
        return {"": args.output}
    # Validation first: the small one finds out in seconds that a split is empty.
    return {name: Path(f"{args.output}-{name}") for name in ("valid", "train")}


def check_arguments(args: argparse.Namespace) -> list[inputs.SourceFile]:
    """The input files.

    Raises:
        ValueError: every violation, one a line.
    """
    problems = []
    if args.workers < 1:
        problems.append(f"--workers {args.workers}: must be at least 1")
    if args.train_tokenizer is not None and args.train_tokenizer < MIN_VOCAB_SIZE:
        problems.append(f"--train-tokenizer {args.train_tokenizer}: at least {MIN_VOCAB_SIZE}")
    if not 0 <= args.split_valid < 1:
        problems.append(f"--split-valid {args.split_valid}: must be in [0, 1)")
    problems += [f"--suffix {s}: must start with a dot" for s in args.suffix or () if s[:1] != "."]
    if args.stdlib:
        ignored = {
            "INPUT": args.inputs, "--tokenizer": args.tokenizer, "--suffix": args.suffix,
            "--split-valid": args.split_valid, "--strict": args.strict,
            "--no-append-eod": not args.append_eod, "--overwrite": args.overwrite,
        }  # fmt: skip
        problems += [f"{name}: has no meaning with --stdlib" for name, on in ignored.items() if on]
    elif not args.inputs:
        problems.append("INPUT: none given; name files or folders, or pass --stdlib")
    elif args.output is None:
        problems.append("--output: missing; give the prefix of the files to write")
    if not args.stdlib and (args.tokenizer is None) == (args.train_tokenizer is None):
        problems.append("tokenizer: give one of --tokenizer DIR and --train-tokenizer VOCAB")
    if not args.stdlib and args.output is not None and not args.overwrite:
        taken = [path for p in output_prefixes(args).values() for path in pair(p) if path.exists()]
        problems += [f"{path}: exists; pass --overwrite or another --output" for path in taken]
    files: list[inputs.SourceFile] = []
    try:
        if not args.stdlib:
            files = inputs.list_files(args.inputs, args.suffix or (".py",))
    except ValueError as error:
        problems.append(str(error))
    try:
        if args.tokenizer is not None:
            TextEncoder(args.tokenizer, args.append_eod)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return files


def read(
    args: argparse.Namespace, files: list[inputs.SourceFile], split: str, title: str
) -> Iterator[str]:
    """The texts of one split, under a progress bar over the bytes of all files."""
    args.report = documents.ReadReport()
    found = documents.read_documents(files, args.report, args.json_key, args.strict)
    total = sum(file.size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc=title) as bar:
        for document in found:
            bar.update(document.num_bytes)
            held_out = documents.in_validation(document.key, args.split_valid)
            if not split or held_out == (split == "valid"):
                yield document.text


def prepare(args: argparse.Namespace) -> None:
    """Prepare what the arguments ask for, and print the report."""
    files = check_arguments(args)
    if args.stdlib:
        prepare_stdlib(args)
        return
    if args.strict:
        # A pass of its own, so that bad input is refused before the long work.
        for _ in read(args, files, "", "checking"):
            pass
    tokenizer_dir = args.tokenizer
    if tokenizer_dir is None:
        tokenizer_dir = Path(f"{args.output}-tokenizer")
        texts = read(args, files, "train" if args.split_valid else "", "tokenizer")
        train_tokenizer(texts, args.train_tokenizer, tokenizer_dir)
    built = {}
    for split, prefix in output_prefixes(args).items():
        texts = read(args, files, split, prefix.name)
        built[split] = build_indexed(
            texts, tokenizer_dir, prefix, args.workers, progress=False, append_eod=args.append_eod
        )
    print_report(built, args.report, tokenizer_dir)


def print_report(
    built: dict[str, BuildReport], report: documents.ReadReport, tokenizer_dir: Path
) -> None:
    for split, part in built.items():
        print(
            f"{split or 'all'}: {part.num_documents:,} documents, {part.num_tokens:,} tokens, "
            f"{part.num_bytes:,} bytes of text in {part.prefix}.bin and {part.prefix}.idx"
        )
    print("\n".join(report.lines()) or "no bad lines")
    if "" in built:
        print_flags({"--data-path": built[""].prefix}, tokenizer_dir)
    else:
        paths = {f"--{split}-data-path": built[split].prefix for split in ("train", "valid")}
        print_flags(paths, tokenizer_dir)


def prepare_stdlib(args: argparse.Namespace) -> None:
    data = corpus.stdlib_corpus(
        args.output or Path("data"), args.train_tokenizer or 4096, args.workers
    )
    print(
        f"{data.description}\n{data.num_documents:,} documents, {data.train_tokens:,} training and "
        f"{data.valid_tokens:,} validation tokens, vocabulary {data.vocab_size}, "
        f"sha256 {data.sha256}"
    )
    paths = {"--train-data-path": data.train_prefix, "--valid-data-path": data.valid_prefix}
    print_flags(paths, data.tokenizer_dir)


def print_flags(paths: dict[str, Path], tokenizer_dir: Path) -> None:
    flags = [word for flag, path in paths.items() for word in (flag, str(path))]
    flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer_dir)]
    print(f"train with: {shlex.join(flags)}")


def main() -> int:
    args = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # Megatron warns on import about GPU libraries, which preparing data does not use.
    warnings.filterwarnings("ignore")
    # So that a batch system's stop removes the partial files.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        prepare(args)
    except ValueError as error:
        print(f"prepare_data: refused\n{error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        print(f"prepare_data: cannot read or write: {error}", file=sys.stderr)
        return EXIT_STORAGE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
