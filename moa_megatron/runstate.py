"""status.json and the exit contract: what a launcher reads to decide what happens next.

0 finished · 75 stopped early with a checkpoint, retry · 78 configuration or input, never retry ·
74 storage · 16/17 Megatron's rerun verdicts · 93 gave up · anything else: failed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

FINISHED, FAILED, STORAGE, RETRY, REFUSED, GAVE_UP = 0, 1, 74, 75, 78, 93
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
# Where an error has lost its number on the way: errors that crossed a process, torch's writer.
_STORAGE_MESSAGES = ("No space left on device", "Disk quota exceeded", "Read-only file system")
_TRACKER = "latest_checkpointed_iteration.txt"


def write_status(run_dir: Path, state: str, exit_code: int | None, **facts: Any) -> None:
    """Replaces ``run_dir/status.json`` atomically.

    Args:
        state: running, finished, stopped, failed.
        exit_code: of the exit contract; None while running.
        facts: step, checkpoint, losses and whatever else a reader wants.
    """
    record = {"state": state, "exit_code": exit_code, "time": time.time(), **facts}
    temporary = run_dir / f".status.{socket.gethostname()}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, run_dir / "status.json")


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The last record, or None where there is none that can be read."""
    try:
        record = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def checkpoint_step(checkpoints: Path) -> int | None:
    """Step of the newest complete checkpoint; None for a folder without one.

    Megatron names that step in a tracker file, written in place after each save: a crash can leave
    it empty, or missing beside a first save that did not complete. Then the folders decide.

    Raises:
        ValueError: a tracker that cannot be believed and no complete checkpoint to fall back on:
            starting at step 0 there would throw work away silently.
    """
    tracker = checkpoints / _TRACKER
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        text = None
    if text is not None and text.isdigit():
        return int(text)
    complete = complete_steps(checkpoints)
    if complete:
        return complete[-1]
    if text is None and not any(checkpoints.glob("iter_*/mp_rank_*")):
        return None  # nothing, or a first save that a crash cut short
    raise ValueError(
        f"{tracker} reads {text!r} instead of a step, and no iter_ folder beside it is complete: "
        "write the number of a good one into it, or choose another --run-dir"
    )


def repair_tracker(checkpoints: Path, step: int) -> bool:
    """Makes the tracker name ``step``, which Megatron exits over otherwise; True where it did not.

    Every rank may do this at once: the file is replaced atomically by the same content.
    """
    tracker = checkpoints / _TRACKER
    if tracker.is_file() and tracker.read_text(encoding="utf-8").strip() == str(step):
        return False
    temporary = checkpoints / f".tracker.{socket.gethostname()}.{os.getpid()}.tmp"
    temporary.write_text(str(step), encoding="utf-8")
    os.replace(temporary, tracker)
    return True


def complete_steps(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints whose save completed, ascending.

    A distributed checkpoint's ``.metadata`` is written after all its shards (torch's
    ``FileSystemWriter.finish``), Megatron's ``metadata.json`` after that, if the format has it.
    """
    found = [path.parent for path in checkpoints.glob("iter_*/.metadata")]
    whole = [folder for folder in found if (folder / "metadata.json").exists()] or found
    names = (folder.name.removeprefix("iter_") for folder in whole)
    return sorted(int(name) for name in names if name.isdigit())


def is_storage_error(error: BaseException) -> bool:
    """Whether an exception, or one that caused it, says that storage failed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _STORAGE_ERRORS:
            return True
        # torch's CheckpointException keeps each rank's failure as (exception, traceback).
        for failure in getattr(seen, "failures", {}).values():
            if is_storage_error(failure[0]):
                return True
        if says_storage(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def says_storage(text: str) -> bool:
    """Whether a message says that storage failed."""
    return any(message in text for message in _STORAGE_MESSAGES)


def first_writer(path: Path, text: str) -> bool:
    """Writes ``path`` unless another rank has: of several failures the first one counts.

    Returns whether this was the first. A disk too full to write it counts as that, too: every
    rank may find it so, and one of them must report.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def write_failure(exit_file: Path, rank: int, code: int, error: str, step: int | None) -> None:
    """Leaves this rank's account of its failure beside ``exit_file``, for ``read_failures``."""
    record = {
        "rank": rank,
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "step": step,
        "code": code,
        "error": error[-4000:],
        "time": time.time(),
    }
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself
        path = exit_file.with_name(f"{exit_file.name}.rank{rank}")
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")


def count_failures(exit_file: Path) -> int:
    """How many ranks have written of their failure."""
    return sum(1 for _ in exit_file.parent.glob(f"{exit_file.name}.rank*"))


def read_failures(exit_file: Path) -> list[dict[str, Any]]:
    """What failing ranks wrote of themselves, earliest first."""
    records = []
    for path in exit_file.parent.glob(f"{exit_file.name}.rank*"):
        with contextlib.suppress(OSError, ValueError):
            records.append(json.loads(path.read_text(encoding="utf-8")))
    return sorted(records, key=lambda record: record["time"])
