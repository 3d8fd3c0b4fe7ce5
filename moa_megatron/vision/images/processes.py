"""A lazy, ordered map over worker processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from moa_megatron.stopping import die_with_parent

# map(function, arguments of each call): the results in this order.
Map = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]

_AHEAD = 4  # calls of each process that wait, so that millions of them need no memory


@contextlib.contextmanager
def mapping(workers: int) -> Iterator[Map]:
    """A map over `workers` processes, which start with the first call; 1 means this process.

    The workers' stderr is silent: image decoders write lines there that name no file. Errors come
    back as exceptions; `BrokenProcessPool` says that a worker was killed.
    """
    if workers == 1:
        yield lambda function, calls: (function(*call) for call in calls)
        return
    # Not forked: the threads of DALI and torch do not survive that.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start)

    def mapped(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        waiting: deque[Future[Any]] = deque()
        for call in calls:
            waiting.append(pool.submit(function, *call))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield mapped
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, too
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
