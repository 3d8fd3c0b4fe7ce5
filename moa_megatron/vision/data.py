"""Which images a run reads: their indices, built once per launch, and their identity."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from moa_megatron import packages, runstate
from moa_megatron.recipes import RefusedError

logger = logging.getLogger(__name__)

_SPLITS = ("train", "valid")


def choose(args: argparse.Namespace, exit_file: Path | None, dry_run: bool) -> str:
    """Fills in the images of a run and says what is read.

    Rank 0 lists and checks them, which takes a while the first time; the others wait for its word,
    so that a shared file system is walked once and all ranks refuse alike.

    Args:
        args: gets ``moa_image_index``, the index file of each split, ``moa_image_digests`` and
            ``moa_image_count``, the number of training images.
        exit_file: of the launch, beside which ranks leave notes; None for a single process.
        dry_run: check no images; say what is known of them.

    Raises:
        RefusedError: no images, or too many bad ones.
    """
    args.moa_image_index, args.moa_image_digests, args.moa_image_count = {}, {}, 0
    if args.mock_data:
        return "random images (--mock-data)"
    packages.require_vision()
    named = args.train_data_path or args.valid_data_path
    if not named and args.moa_corpus == "digits":
        from moa_megatron.vision.digits import digits

        found = digits(Path(args.moa_cache_dir))
        args.train_data_path, args.valid_data_path = [str(found.train)], [str(found.valid)]
    _check_paths(args)
    note = None if exit_file is None else exit_file.with_name(f"{exit_file.name}.images")
    first = os.environ.get("RANK", "0") == "0"
    if dry_run:
        record = _indices(args, build=False)
    else:
        record = _build(args, note) if first or note is None else _wait(note, exit_file)
    if "refused" in record:
        raise RefusedError(record["refused"])
    args.moa_image_index, args.moa_image_digests = record["index"], record["digests"]
    missing = [path for path in record["index"].values() if not Path(path).is_file()]
    if missing:
        raise RefusedError(
            f"{missing[0]}, which rank 0 has written, is not on {os.uname().nodename}: name a "
            "folder that all nodes share with --moa-cache-dir (or XDG_CACHE_HOME)"
        )
    args.moa_image_count = record["count"]
    return str(record["description"])


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """What decides which images and masks a position in the run has, of plain values.

    The number of ranks is not part of it: the order is one for all layouts.
    """
    found: dict[str, Any] = {
        "seed": args.seed,
        "image size": f"{args.img_h} x {args.img_w}, patches of {args.patch_dim}",
        "mask ratio": args.mae_mask_ratio,
        "crop scale": " to ".join(f"{share:g}" for share in args.mae_crop_scale),
        "flip": bool(args.mae_flip),
        "pixel mean and std": [*args.mae_pixel_mean, *args.mae_pixel_std],
        "training data": "random images" if args.mock_data else None,
        "validation data": None,
    }
    for split, name in (("train", "training data"), ("valid", "validation data")):
        found[name] = args.moa_image_digests.get(split, found[name])
    # A dry run may not know them.
    return {name: value for name, value in found.items() if value is not None}


def _check_paths(args: argparse.Namespace) -> None:
    if not args.train_data_path and args.valid_data_path:
        raise RefusedError(
            f"--valid-data-path {' '.join(args.valid_data_path)} without --train-data-path: give "
            "both, or neither where the recipe has images of its own"
        )
    if not args.train_data_path:
        raise RefusedError(
            f"no images: {args.moa_recipe} comes without data. Give --train-data-path and "
            "--valid-data-path: folders with one sub-folder for each class, such as ImageNet's "
            "train and val, webdataset .tar files or TFRecord files (docs/images.md); or try the "
            "recipe with --mock-data"
        )
    if args.eval_iters and not args.valid_data_path:
        raise RefusedError(
            "--valid-data-path is missing: give images to evaluate on, or --eval-iters 0"
        )


def _build(args: argparse.Namespace, note: Path | None) -> dict[str, Any]:
    try:
        record = _indices(args)
    except RefusedError as error:
        if note is not None:
            _leave(note, {"refused": str(error)})
        raise
    if note is not None:
        _leave(note, record)
    return record


def _indices(args: argparse.Namespace, build: bool = True) -> dict[str, Any]:
    from moa_megatron.vision.images import building

    cache = Path(args.moa_cache_dir) / "images"
    record: dict[str, Any] = {"index": {}, "digests": {}, "count": 0}
    words = []
    for split in _SPLITS:
        inputs = getattr(args, f"{split}_data_path")
        if not inputs or (split == "valid" and not args.eval_iters):
            continue
        paths, grey = [Path(name) for name in inputs], args.moa_grey_images
        if build:
            share = args.moa_max_bad_images
            found = building.build(paths, cache, grey=grey, max_bad_fraction=share)
        elif (known := building.remembered(paths, cache, grey)) is not None:
            found = known
        else:
            words.append(f"{split} {', '.join(inputs)}, not checked yet")
            continue
        record["index"][split], record["digests"][split] = str(found.file), found.digest
        if split == "train":
            record["count"] = len(found)
        words.append(f"{split} {found.describe()}")
    record["description"] = "; ".join(words)
    return record


def _leave(note: Path, record: dict[str, Any]) -> None:
    temporary = note.with_suffix(".tmp")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    os.replace(temporary, note)


def _wait(note: Path, exit_file: Path | None) -> dict[str, Any]:
    began = said = time.monotonic()
    while not note.exists():
        if exit_file is not None and runstate.count_failures(exit_file):
            raise RefusedError("rank 0, which checks the images, has failed")
        if time.monotonic() - said > 60:
            said = time.monotonic()
            logger.info("waiting for rank 0 to check the images, %.0f s so far", said - began)
        time.sleep(0.2)
    record: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    return record
