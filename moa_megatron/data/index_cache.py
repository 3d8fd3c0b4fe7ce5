"""Dataset indices of a run, built without a GPU: `tools/prepare_data.py --build-index RECIPE`.

Megatron takes an index for good when its files exist, and writes them in place: one that was cut by
a kill would be used. Here they are built in a folder of their own and moved, description last.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import shlex
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moa_megatron.data.token_files import pair

if TYPE_CHECKING:
    from moa_megatron.launch import Run

logger = logging.getLogger(__name__)

_DESCRIPTION = "-description.txt"
# A younger file that is too short may be one that a run is writing at this moment.
_SETTLED_SECONDS = 120.0
_EXIT_INPUT, _EXIT_STORAGE = 78, 74


def main(argv: list[str]) -> int:
    """`--build-index RECIPE [flags]`: prints what is in the cache; returns the exit code."""
    from moa_megatron import recipes

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore")
    try:
        run = _prepared(argv)
        folder, built, found = build(run)
    except recipes.RefusedError as error:
        print(f"prepare_data: refused\n{error}", file=sys.stderr)
        return _EXIT_INPUT
    except OSError as error:
        print(f"prepare_data: cannot read or write: {error}", file=sys.stderr)
        return _EXIT_STORAGE
    for title, paths in (("built", built), ("found", found)):
        for path in paths:
            print(f"{title} {path.name}  {path.stat().st_size:,} bytes")
    print(
        f"{len(built)} files built, {len(found)} found in {folder}\n"
        f"train with: {shlex.join([*argv, '--data-cache-path', str(folder)])}"
    )
    return 0


def _prepared(argv: list[str]) -> Run:
    from moa_megatron import host, recipes

    # As a dry run: the folder of a run is not needed, and this host may have no GPU.
    command = recipes.parse_command_line([*argv, "--dry-run"])
    recipes.load(command.recipe)
    host.install(force=True)
    from moa_megatron import launch, patches

    patches.apply()
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron lists a thousand arguments
        return launch.prepare(command, host.HOST_ARGS, mends_index=True)


def build(run: Run) -> tuple[Path, list[Path], list[Path]]:
    """Build the indices of a run's first rank, those which its cache does not have yet.

    Returns:
        The cache, the files built, and those of this run that were there.

    Raises:
        RefusedError: no data or no cache is named.
        OSError: the cache cannot be written; nothing incomplete is left in it.
    """
    from moa_megatron.recipes import RefusedError

    if run.args.mock_data:
        raise RefusedError("--mock-data: random tokens have no index")
    if run.args.data_cache_path is None:
        raise RefusedError("--data-cache-path is missing: name the folder that the run reads too")
    cache = Path(run.args.data_cache_path).absolute()
    bad = damaged(cache, settled_seconds=0)
    for problem in bad.values():
        logger.warning("%s; it is built anew", problem)
    building = cache / f".building-{uuid.uuid4().hex[:8]}"
    building.mkdir(parents=True)
    try:
        for path in _complete(cache, set(bad)):
            (building / path.name).symlink_to(path)
        with contextlib.redirect_stdout(io.StringIO()):
            indices = _build_datasets(run, building)
        built = [path for path in building.iterdir() if not path.is_symlink()]
        # A reader needs all files of an index: the last one to appear makes it complete.
        for path in sorted(built, key=lambda path: path.name.endswith(_DESCRIPTION)):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(path, cache / path.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    new = sorted(cache / path.name for path in built)
    files = [path for path in cache.iterdir() if _index_of(path) in indices]
    return cache, new, sorted(set(files) - set(new))


def _build_datasets(run: Run, folder: Path) -> set[str]:
    """Build into `folder` what is not there; the names (`_index_of`) of all indices of the run."""
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.training.global_vars import set_global_variables
    from megatron.training.training import get_train_valid_test_num_samples, update_train_iters

    from moa_megatron import batches

    # Only the tokenizer of these is needed, no writer of a run that does not take place.
    run.args.tensorboard_dir, run.args.wandb_project = None, ""
    set_global_variables(run.args)
    update_train_iters(run.args)
    config = batches.dataset_config(run.args)
    config.path_to_cache = str(folder)
    # These have ranks trust the cache unseen: here it is what is being made.
    config.fast_cache_load = config.defer_npy_index_mmap = False
    logging.getLogger("megatron.core.datasets.gpt_dataset").setLevel(logging.INFO)
    logging.getLogger("megatron.core.datasets.blended_dataset").setLevel(logging.INFO)
    sizes = get_train_valid_test_num_samples()
    waiting = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    names = set()
    while waiting:
        dataset = waiting.pop()
        if isinstance(dataset, list):  # several validation sets
            waiting += dataset
        elif dataset is not None:
            waiting += dataset.datasets if isinstance(dataset, BlendedDataset) else []
            split = (
                dataset.split if isinstance(dataset, BlendedDataset) else dataset.index_split
            ).name
            names.add(f"{dataset.unique_description_hash}-{type(dataset).__name__}-{split}")
    return names


def damaged(cache: Path, settled_seconds: float = _SETTLED_SECONDS) -> dict[Path, str]:
    """The files in a cache that Megatron would take for good, each with its problem.

    Arrays that are shorter than their headers say, unless younger than `settled_seconds`, and
    indices of pairs that have been written anew.
    """
    found = {}
    for path in sorted(cache.glob("*.npy")) if cache.is_dir() else []:
        try:
            status = path.stat()
            if time.time() - status.st_mtime < settled_seconds:
                continue
            needed = _needed_bytes(path)
        except FileNotFoundError:  # a run that rebuilds it has just removed it
            continue
        except ValueError as error:
            found[path] = f"{path}: no array ({error}), {status.st_size:,} bytes"
            continue
        if status.st_size != needed:
            found[path] = f"{path}: cut, {status.st_size:,} bytes of {needed:,}"
    for description in sorted(cache.glob(f"*{_DESCRIPTION}")) if cache.is_dir() else []:
        if problem := _stale(description):
            found[description] = problem
    return found


def _stale(description: Path) -> str | None:
    """Whether the pair of an index is younger: Megatron's key holds its path, not its content."""
    try:
        prefix = json.loads(description.read_text(encoding="utf-8"))["dataset_path"]
        built = description.stat().st_mtime
        newer = [path for path in pair(Path(prefix)) if path.stat().st_mtime > built]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # of a blend, or being written, or of data that is gone
    if not newer:
        return None
    return f"{description}: index of older data, {newer[0]} has been written since"


def caches(args: argparse.Namespace, prefixes: Sequence[str]) -> list[Path]:
    """Where Megatron keeps the indices of a run: one folder, or one beside each pair."""
    if args.data_cache_path is not None:
        return [Path(args.data_cache_path)]
    return [Path(prefix, "cache", "GPTDataset_indices") for prefix in dict.fromkeys(prefixes)]


def _needed_bytes(path: Path) -> int:
    """Raises ValueError where the header is no array's."""
    with path.open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        return int(stream.tell() + np.prod(shape, dtype=np.int64) * dtype.itemsize)


def _complete(cache: Path, bad: set[Path]) -> list[Path]:
    """Files of the indices in a cache that are whole: all are there, none is damaged.

    Megatron builds an index anew where a file is missing, through any link to the others.
    """
    indices: dict[str, list[Path]] = {}
    for path in (*cache.glob("*.npy"), *cache.glob(f"*{_DESCRIPTION}")):
        indices.setdefault(_index_of(path), []).append(path)
    return [
        path
        for name, files in indices.items()
        if len(files) == (3 if "-BlendedDataset-" in name else 4) and not bad.intersection(files)
        for path in files
    ]


def _index_of(path: Path) -> str:
    """``HASH-CLASS-SPLIT`` of ``HASH-CLASS-SPLIT-KIND.npy``."""
    return path.name.rsplit("-", 1)[0]
