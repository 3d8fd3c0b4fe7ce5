"""status.json and the exit contract: what a launcher reads to decide what happens next.

0 finished · 75 stopped early with a checkpoint, retry · 78 configuration or input, never retry ·
74 storage · 16/17 Megatron's rerun verdicts · 93 gave up · anything else: failed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

FINISHED, FAILED, STORAGE, RETRY, REFUSED = 0, 1, 74, 75, 78
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
    temporary = run_dir / f".status.{os.getpid()}.tmp"
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
    """Step of the newest complete checkpoint; None for a folder that never held one.

    Raises:
        ValueError: a tracker that cannot be read, or checkpoints without a tracker: starting at
            step 0 there would throw work away silently.
    """
    tracker = checkpoints / _TRACKER
    if not tracker.exists():
        partial = sorted(checkpoints.glob("iter_*")) if checkpoints.is_dir() else []
        if partial:
            raise ValueError(
                f"{checkpoints} holds {partial[-1].name} but no {_TRACKER}: its save did not "
                "complete; remove it to start anew, or choose another --run-dir"
            )
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise ValueError(
            f"{tracker} reads {text!r} instead of a step: write the number of the newest complete "
            "iter_ folder into it, or choose another --run-dir"
        )
    return int(text)


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
        if any(text in str(seen) for text in _STORAGE_MESSAGES):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def first_writer(path: Path, text: str) -> None:
    """Writes ``path`` unless another rank has: of several failures the first one counts."""
    with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
        file.write(text)
