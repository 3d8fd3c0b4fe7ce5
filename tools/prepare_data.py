#!/usr/bin/env python3
"""Turn text into the token files Megatron trains on, and say what was left out.

Inputs are .jsonl and .json files (one document a line) and .txt files (one document each), all of
them also packed (.gz, .zst), and folders (one document for each file with --suffix). Lines that
hold no text are skipped, counted and located. A command that was killed goes on when repeated.
"""

import argparse
import logging
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path

from moa_megatron.data import corpus, documents, inputs, preparing
from moa_megatron.data.encoding import ENGINES, TextEncoder
from moa_megatron.data.parts import Options
from moa_megatron.data.tokenization import MIN_VOCAB_SIZE
from moa_megatron.data.workers import WorkerDiedError
from moa_megatron.recipes import Parser

EXIT_FAILED, EXIT_STORAGE, EXIT_INPUT = 1, 74, 78

EXAMPLES = """examples:
  # the standard library's source, tokenizer included: data for a first run
  tools/prepare_data.py --stdlib

  # own text, own tokenizer, 5 % of the documents held out
  tools/prepare_data.py books.jsonl notes.txt src/ --output data/mine \\
      --train-tokenizer 8192 --split-valid 0.05 --workers 8

  # hundreds of packed shards into pairs of a billion tokens, with a given tokenizer
  tools/prepare_data.py c4/en/*.json.gz --output data/c4 --tokenizer tokenizers/mine \\
      --split-valid 0.001 --shard-tokens 1000000000

  # the dataset indices of a run, built where no GPU waits for them
  tools/prepare_data.py --build-index dense-0.12b --data-cache-path data/index [Megatron's flags]

docs/data.md is the page for all of it.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="INPUT", help=".jsonl, .json, .txt, or a folder")
    add("--stdlib", action="store_true", help="prepare Python's own library instead of INPUT")
    add(
        "--build-index",
        nargs=argparse.REMAINDER,
        metavar="RECIPE [FLAG ...]",
        help="first and alone: build the dataset indices of this run; takes the run's flags",
    )
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
    add(
        "--tokenizer-bytes",
        type=int,
        default=1 << 30,
        metavar="N",
        help="train it on about N bytes of input, from the start of every file (default: 2^30)",
    )
    add("--json-key", default="text", help="key of the text in JSON lines (default: text)")
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
        "--shard-tokens",
        type=int,
        metavar="N",
        help="write pairs PREFIX-00000, ... of N tokens each, and a file that lists them",
    )
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes (default: the cores this process may use)",
    )
    add(
        "--part-bytes",
        type=int,
        default=256 << 20,
        metavar="N",
        help="input to a part, the unit that a repeated command skips (default: 2^28)",
    )
    add(
        "--max-line-bytes",
        type=int,
        default=documents.MAX_LINE_BYTES,
        metavar="N",
        help="skip longer lines and text files; bounds a worker's memory (default: 2^26)",
    )
    add(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="what tokenizes: gigatoken where it is installed and agrees (default: auto)",
    )
    add("--strict", action="store_true", help="refuse input with bad lines instead of skipping")
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's eos_token (default: yes)",
    )
    add("--overwrite", action="store_true", help="replace existing output and unfinished parts")
    return parser.parse_args(argv)  # fmt: skip


def checked_request(args: argparse.Namespace) -> preparing.Request:
    """What the arguments ask for.

    Raises:
        ValueError: every violation, one a line.
    """
    problems = value_problems(args)
    if not args.inputs:
        problems.append("INPUT: none given; name files or folders, or pass --stdlib")
    if args.output is None:
        problems.append("--output: missing; give the prefix of the files to write")
    if (args.tokenizer is None) == (args.train_tokenizer is None):
        problems.append("tokenizer: give one of --tokenizer DIR and --train-tokenizer VOCAB")
    files: list[inputs.SourceFile] = []
    try:
        files = inputs.list_files(args.inputs, args.suffix or (".py",))
    except ValueError as error:
        problems.append(str(error))
    try:
        if args.tokenizer is not None:
            TextEncoder(args.tokenizer, args.append_eod, args.engine)
    except ValueError as error:
        problems.append(str(error))
    options = Options(
        args.json_key, args.split_valid, args.append_eod, args.max_line_bytes, args.part_bytes
    )
    request = preparing.Request(
        files, args.output or Path(), options, args.tokenizer, args.train_tokenizer,
        args.tokenizer_bytes, args.engine, args.workers, args.strict, args.overwrite,
        args.shard_tokens,
    )  # fmt: skip
    if args.output is not None:
        found = preparing.taken(request)
        problems += [f"{path}: exists; pass --overwrite or another --output" for path in found]
        if args.shard_tokens and not args.split_valid and " " in str(args.output.absolute()):
            problems.append(f"--output {args.output}: Megatron reads no blank in a list of shards")
    if problems:
        raise ValueError("\n".join(problems))
    return request


def value_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    for name in ("workers", "part_bytes", "max_line_bytes", "tokenizer_bytes", "shard_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if args.train_tokenizer is not None and args.train_tokenizer < MIN_VOCAB_SIZE:
        problems.append(f"--train-tokenizer {args.train_tokenizer}: at least {MIN_VOCAB_SIZE}")
    if not 0 <= args.split_valid < 1:
        problems.append(f"--split-valid {args.split_valid}: must be in [0, 1)")
    problems += [f"--suffix {s}: must start with a dot" for s in args.suffix or () if s[:1] != "."]
    return problems


def prepare_stdlib(args: argparse.Namespace) -> None:
    ignored = {
        "INPUT": args.inputs, "--tokenizer": args.tokenizer, "--suffix": args.suffix,
        "--split-valid": args.split_valid, "--strict": args.strict,
        "--no-append-eod": not args.append_eod, "--overwrite": args.overwrite,
        "--shard-tokens": args.shard_tokens,
    }  # fmt: skip
    problems = [f"{name}: has no meaning with --stdlib" for name, on in ignored.items() if on]
    if problems := problems + value_problems(args):
        raise ValueError("\n".join(problems))
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


def print_result(request: preparing.Request, result: preparing.Result) -> None:
    for split, found in result.splits.items():
        tokens, num_documents = sum(p.tokens for p in found), sum(p.documents for p in found)
        prefix = request.prefix(split)
        where = f"{prefix}.bin and {prefix}.idx"
        if request.shard_tokens:
            where = f"{len(found)} pairs {prefix.parent / found[0].prefix}, ..."
        print(
            f"{split or 'all'}: {num_documents:,} documents, {tokens:,} tokens, "
            f"{result.num_bytes[split]:,} bytes of text in {where}"
        )
    print("\n".join(result.report.lines()) or "no bad lines")
    print_flags(result.flags, result.tokenizer_dir)


def print_flags(paths: dict[str, Path], tokenizer_dir: Path) -> None:
    flags = [word for flag, path in paths.items() for word in (flag, str(path))]
    flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer_dir)]
    print(f"train with: {shlex.join(flags)}")


def run(args: argparse.Namespace) -> None:
    if args.stdlib:
        prepare_stdlib(args)
    else:
        request = checked_request(args)
        print_result(request, preparing.prepare(request))


def main() -> int:
    try:
        args = parse_arguments()
    except ValueError as error:
        print(f"prepare_data: refused\n{error}; see --help", file=sys.stderr)
        return EXIT_INPUT
    if args.build_index is not None:
        # Late: this needs torch and Megatron, which preparing does not.
        from moa_megatron.data import index_cache

        return index_cache.main(args.build_index)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore")
    # So that a batch system's stop ends the workers and removes the partial files.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run(args)
    except ValueError as error:
        print(f"prepare_data: refused\n{error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        print(f"prepare_data: cannot read or write: {error}", file=sys.stderr)
        return EXIT_STORAGE
    except WorkerDiedError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
