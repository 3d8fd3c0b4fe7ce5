#!/usr/bin/env python3
"""Mix corpora that tools/prepare_data.py has made into one file of weights for a run.

Weights and prefixes alternate, as after Megatron's --data-path; a prefix is what was --output. A
corpus's weight is shared among its shards by their tokens. The corpora must have one tokenizer.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from moa_megatron.data import blends
from moa_megatron.data.tokenization import write_text
from moa_megatron.recipes import Parser

EXIT_STORAGE, EXIT_INPUT = 74, 78

EXAMPLES = """example:
  tools/blend_data.py 0.7 data/web 0.3 data/code --output data/mix.json
"""


def main() -> int:
    parser = Parser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpora", nargs="*", metavar="WEIGHT PREFIX", help="0.7 data/web ...")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the file to write")
    try:
        args = parser.parse_args()
        prefixes, weights = weights_and_prefixes(args)
        lists = blends.blend(prefixes, weights)
        write_text(args.output, json.dumps(lists, indent=1) + "\n")
    except ValueError as error:
        print(f"blend_data: refused\n{error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        print(f"blend_data: cannot read or write: {error}", file=sys.stderr)
        return EXIT_STORAGE
    for split, words in lists.items():
        print(f"{split}: {len(words or []) // 2} pairs")
    folder = blends.tokenizer_of(prefixes)
    flags = ["--per-split-data-args-path", str(args.output)]
    flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder or "DIR")]
    print(f"train with: {shlex.join(flags)}")
    if folder is None:
        print("where DIR is the tokenizer that prepared the corpora")
    return 0


def weights_and_prefixes(args: argparse.Namespace) -> tuple[list[Path], list[float]]:
    problems, weights = [], []
    if not args.corpora or len(args.corpora) % 2:
        problems.append(
            f"WEIGHT PREFIX: {len(args.corpora)} words; give pairs, such as 0.7 data/web 0.3 data/b"
        )
    if args.output is None:
        problems.append("--output: missing; give the file to write, such as data/mix.json")
    for word in args.corpora[::2]:
        try:
            weights.append(float(word))
        except ValueError:
            problems.append(f"WEIGHT {word}: no number; each comes before its PREFIX")
    if problems:
        raise ValueError("\n".join(problems))
    return [Path(word) for word in args.corpora[1::2]], weights


if __name__ == "__main__":
    sys.exit(main())
