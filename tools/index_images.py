#!/usr/bin/env python3
"""Check images and build their index ahead of a run, on a host without a GPU.

INPUT is a folder tree of images (sub-folders are the classes), a webdataset .tar, a TFRecord file,
or a folder of those. Every image is decoded once; what is damaged, grey or has an alpha channel is
listed and left out. A run with the same inputs, flags and cache starts from the index at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moa_megatron.data.once import default_cache  # noqa: E402
from moa_megatron.recipes import Parser, RefusedError  # noqa: E402
from moa_megatron.runstate import FAILED, REFUSED, STORAGE  # noqa: E402
from moa_megatron.vision.images.building import bad_by_reason, build  # noqa: E402
from moa_megatron.vision.images.index import ImageIndex  # noqa: E402

EXAMPLES = """examples:
  tools/index_images.py data/imagenet/train --workers 16
  tools/index_images.py shards/train-*.tar --moa-cache-dir /scratch/cache --moa-grey-images
  tools/index_images.py data/photographs --moa-max-bad-images 0.05

docs/images.md says what is checked.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="folder, .tar or TFRecord file")
    add("--moa-cache-dir", type=Path, default=default_cache(), metavar="DIR",
        help=f"where runs look for the index (default: {default_cache()})")  # fmt: skip
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="processes (default: the cores this process may use)")  # fmt: skip
    add("--moa-grey-images", action="store_true", help="take grey images, too, as RGB")
    add("--moa-max-bad-images", type=float, default=0.01, metavar="F",
        help="fraction of the images that may be bad (default: 0.01)")  # fmt: skip
    return parser.parse_args(argv)


def checked(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: every violation, one a line.
    """
    problems = []
    if args.workers < 1:
        problems.append(f"--workers {args.workers}: must be at least 1")
    if not 0 <= args.moa_max_bad_images <= 1:
        problems.append(f"--moa-max-bad-images {args.moa_max_bad_images}: must be from 0 to 1")
    if problems:
        raise ValueError("\n".join(problems))


def report(found: ImageIndex) -> str:
    """A few lines on what the index holds."""
    lines = [found.describe()]
    counts = np.unique(found.label[found.label >= 0], return_counts=True)[1]
    if len(counts) > 1:
        lines.append(
            f"classes: {len(counts):,}, of {counts.min():,} to {counts.max():,} images; "
            f"first {', '.join(found.class_names[:5] or map(str, np.unique(found.label)[:5]))}"
        )
    for name, values, unit in (
        ("short side", np.minimum(found.height, found.width), "pixels"),
        ("encoded", found.size, "bytes"),
    ):
        spread = " ".join(f"{v:,.0f}" for v in np.percentile(values, (0, 5, 50, 95, 100)))
        lines.append(f"{name}: {spread} {unit} (minimum, 5 %, median, 95 %, maximum)")
    reasons = bad_by_reason(found)
    lines += [f"bad: {count:,} {reason}" for reason, count in reasons.most_common()]
    lines += [f"ignored: {count:,} {kind}" for kind, count in found.ignored.most_common(10)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # So that a batch system's stop ends the workers, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        args = parse_arguments(argv)
        checked(args)
        found = build(
            args.inputs,
            args.moa_cache_dir / "images",
            grey=args.moa_grey_images,
            max_bad_fraction=args.moa_max_bad_images,
            workers=args.workers,
        )
    except ValueError as error:
        hint = "" if isinstance(error, RefusedError) else "; see --help"
        print(f"index_images: refused\n{error}{hint}", file=sys.stderr)
        return REFUSED
    except OSError as error:
        print(f"index_images: cannot read or write: {error}", file=sys.stderr)
        return STORAGE
    except RuntimeError as error:
        print(f"index_images: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
