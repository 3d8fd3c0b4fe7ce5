"""Folders that are prepared once and shared: complete or absent, whoever is killed or first."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

logger = logging.getLogger(__name__)


def default_cache() -> Path:
    """Beside the kernels' own: one variable moves all that is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moa_megatron"


def prepare_once(
    folder: Path,
    prepare: Callable[[Path], None],
    is_complete: Callable[[Path], bool] = Path.is_dir,
) -> None:
    """Has `prepare` fill a folder of another name, then renames that to `folder`.

    Processes that call at once get the same folder: one prepares it, the others wait, and where
    the file system has no locks they all prepare it and the first to finish is kept. A folder that
    is there but not complete is replaced.

    Raises:
        OSError: the folder's parent cannot be written.
    """
    if is_complete(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = stack.enter_context((folder.parent / f".{folder.name}.lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            logger.info("no file locks in %s (%s): preparing alone", folder.parent, error)
        if not is_complete(folder):
            _prepare(folder, prepare, is_complete)


def _prepare(
    folder: Path, prepare: Callable[[Path], None], is_complete: Callable[[Path], bool]
) -> None:
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        prepare(partial)
        if folder.is_dir() and not is_complete(folder):
            logger.warning("%s is damaged: preparing it again", folder)
            shutil.rmtree(folder)
        try:
            partial.rename(folder)
        except OSError:
            if not is_complete(folder):  # else: another process was first, with the same data
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
