"""Dataset indices of a run, built without a GPU: `tools/prepare_data.py --build-index RECIPE`.

Megatron takes an index for good when its files exist, and writes them in place: one that was cut by
a kill would be used. Here they are built in a folder of their own and moved, description last. Its
key names the path of the data, not the content: `stale` finds the indices of earlier data.
"""

from __future__ import annotations

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
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moa_megatron.data.token_files import pair

if TYPE_CHECKING:
    from moa_megatron.launch import Run

logger = logging.getLogger(__name__)

_DESCRIPTION = "-description.txt"
# The arrays of an index by its class; the description is written before them.
_ARRAYS = {
    "GPTDataset": ("document_index", "sample_index", "shuffle_index"),
    "BlendedDataset": ("dataset_index", "dataset_sample_index"),
}
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

    Damaged and stale ones are built anew; what this run does not read of them is removed.

    Returns:
        The cache, the files built, and those of this run that were there.

    Raises:
        RefusedError: no data or no cache is named.
        OSError: the cache cannot be written; nothing incomplete is left in it.
    """
    from moa_megatron.preflight import data_prefixes
    from moa_megatron.recipes import RefusedError

    if run.args.mock_data:
        raise RefusedError("--mock-data: random tokens have no index")
    if run.args.data_cache_path is None:
        raise RefusedError("--data-cache-path is missing: name the folder that the run reads too")
    cache = Path(run.args.data_cache_path).absolute()
    prefixes = data_prefixes(run.args)
    bad, old = damaged(cache, settled_seconds=0), stale(cache, prefixes, settled_seconds=0)
    older = [f"{cache / name}-*: older than {prefix}.bin" for name, prefix in old.items()]
    for problem in [*bad.values(), *older]:
        logger.warning("%s; it is built anew, or removed if this run does not read it", problem)
    building = cache / f".building-{uuid.uuid4().hex[:8]}"
    building.mkdir(parents=True)
    try:
        for path in _complete(cache, {_index_of(path) for path in bad} | set(old)):
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
    _remove_useless(cache, prefixes)
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
    """The arrays in a cache that are shorter than their headers say, each with its problem.

    Files younger than `settled_seconds` are left out.
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
    return found


def stale(
    cache: Path, prefixes: Collection[str], settled_seconds: float = _SETTLED_SECONDS
) -> dict[str, str]:
    """The whole indices in a cache that are older than their data: index name to data prefix.

    Only those of `prefixes` are looked at, spelt as the run spells them. One that has an older file
    and another younger than `settled_seconds` is left out: a run may be writing it.
    """
    found = {}
    for description in sorted(cache.glob(f"*{_DESCRIPTION}")) if cache.is_dir() else []:
        try:
            times = [path.stat().st_mtime for path in _files(description)]
            named = _dataset_paths(json.loads(description.read_text(encoding="utf-8")))
            if not times or not named or not named <= set(prefixes):
                continue
            made = {
                prefix: max(path.stat().st_mtime for path in pair(Path(prefix))) for prefix in named
            }
        except (FileNotFoundError, ValueError):  # not whole: Megatron does not take it either
            continue
        prefix = max(made, key=lambda name: made[name])
        is_written = max(times) >= made[prefix] and time.time() - max(times) < settled_seconds
        if min(times) < made[prefix] and not is_written:
            found[_index_of(description)] = prefix
    return found


def default_folders(prefixes: Collection[str]) -> list[Path]:
    """Where Megatron keeps the index of each pair when `--data-cache-path` is not given."""
    return [Path(prefix) / "cache" / "GPTDataset_indices" for prefix in prefixes]


def _dataset_paths(description: Any) -> set[str]:
    """All data prefixes in a description; a blend's holds those of its parts."""
    if isinstance(description, list):
        return {path for item in description for path in _dataset_paths(item)}
    if not isinstance(description, dict):
        return set()
    path = description.get("dataset_path")
    own = {path} if isinstance(path, str) else set()
    return own | _dataset_paths(list(description.values()))


def _remove_useless(cache: Path, prefixes: Collection[str]) -> None:
    """Remove what a run would refuse: left of indices that the run just served does not read."""
    for name in stale(cache, prefixes):
        for path in _files(cache / f"{name}{_DESCRIPTION}"):
            path.unlink(missing_ok=True)
    for path in damaged(cache):
        path.unlink(missing_ok=True)


def _needed_bytes(path: Path) -> int:
    """Raises ValueError where the header is no array's."""
    with path.open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        return int(stream.tell() + np.prod(shape, dtype=np.int64) * dtype.itemsize)


def _complete(cache: Path, unusable: set[str]) -> list[Path]:
    """Files of the whole indices in a cache, without those named in `unusable`.

    Megatron builds an index anew where a file is missing, through any link to the others.
    """
    indices = [_files(description) for description in cache.glob(f"*{_DESCRIPTION}")]
    return [
        path
        for files in indices
        if files and _index_of(files[0]) not in unusable and all(f.is_file() for f in files)
        for path in files
    ]


def _files(description: Path) -> list[Path]:
    """All files that an index must have, its description first; none for an unknown class."""
    name = _index_of(description)
    arrays = _ARRAYS.get(name.rpartition("-")[0].rpartition("-")[2], ())
    paths = [description.with_name(f"{name}-{array}.npy") for array in arrays]
    return [description, *paths] if paths else []


def _index_of(path: Path) -> str:
    """``HASH-CLASS-SPLIT`` of ``HASH-CLASS-SPLIT-KIND.npy``."""
    return path.name.rsplit("-", 1)[0]
