"""Processes that work through parts, each part by one of them.

Processes, not threads: parsing JSON holds Python's lock, and with a fast encoder that is half of
the work. Nothing passes between them but the number of the next part: results are files.
"""

import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_megatron.data.encoding import TextEncoder
from moa_megatron.data.parts import Options, Part, Workplace, process
from moa_megatron.stopping import die_with_parent

_POLL_SECONDS = 0.2


class WorkerDiedError(RuntimeError):
    """A worker ended without saying why; what is finished stays, so the command can be repeated."""


@dataclass(frozen=True)
class Job:
    """Everything a worker needs."""

    parts: Sequence[Part]
    todo: Sequence[int]
    workplace: Workplace
    options: Options
    tokenizer_dir: Path
    engine: str


def run(job: Job, num_workers: int, on_bytes: Callable[[int], object]) -> None:
    """Finish all parts in `job.todo`; `on_bytes` gets the bytes of input read since the last call.

    Raises:
        ValueError, OSError: as `process` raises it, from the first worker that fails.
        WorkerDiedError: a worker was killed.
    """
    # A forked child of a process whose encoder has used its threads may never wake up.
    context = multiprocessing.get_context("spawn")
    position, total = context.Value("q", 0), context.Value("q", 0)
    errors = context.SimpleQueue()
    workers = [
        context.Process(target=_work, args=(job, position, total, errors), daemon=True)
        for _ in range(min(num_workers, len(job.todo)))
    ]
    seen = 0
    counted = total.get_obj()  # without its lock, which a killed worker may hold for ever
    try:
        for worker in workers:
            worker.start()
        while any(worker.exitcode is None for worker in workers):
            time.sleep(_POLL_SECONDS)
            now = int(counted.value)
            on_bytes(now - seen)
            seen = now
            _raise_failure(workers, errors)
        _raise_failure(workers, errors)
        on_bytes(int(counted.value) - seen)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()


def _raise_failure(workers: Sequence[Any], errors: Any) -> None:
    if not errors.empty():
        raise errors.get()
    for worker in workers:
        if worker.exitcode:
            raise WorkerDiedError(
                f"a worker ended with code {worker.exitcode}"
                + (" (killed, perhaps for want of memory)" if worker.exitcode == -9 else "")
                + "; finished parts are kept: repeat the command, perhaps with fewer --workers"
            )


def _work(job: Job, position: Any, total: Any, errors: Any) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, too, and ends this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def count(num_bytes: int) -> None:
        with total.get_lock():
            total.value += num_bytes

    try:
        encoder = TextEncoder(job.tokenizer_dir, job.options.append_eod, job.engine)
        while True:
            with position.get_lock():
                index = position.value
                position.value += 1
            if index >= len(job.todo):
                return
            number = job.todo[index]
            process(job.parts[number], number, job.workplace, encoder, job.options, count)
    except (ValueError, OSError) as error:
        errors.put(error)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
