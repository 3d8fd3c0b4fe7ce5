"""A pool of processes that runs cases over gloo, started once per pytest session.

Importing Megatron takes seconds, setting up process groups milliseconds: so the processes stay and
each case gets a process group of its own, of as many ranks as it asks for. A case is the name of a
function, "package.module:function", and its keyword arguments; its results come back by rank.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# Four processes that import Megatron at once, on two cores that may be busy.
_START_SECONDS = 180.0
_STOP_SECONDS = 10.0
# Ranks that wait for a failed one are given this long to fail themselves.
_GRACE_SECONDS = 1.0
_Answer = tuple[bool, Any]


class CaseFailed(AssertionError):
    """A case that raised, died or ran out of time; the message holds every rank's traceback."""


class Pool:
    """Processes 0..size-1, started by the first case and restarted after a failed one.

    Args:
        size: largest number of ranks that a case may ask for.
        setup: function each process calls once, before its first case.
        variables: of the environment that the processes start in.
    """

    def __init__(
        self, size: int, setup: str | None = None, variables: dict[str, str] | None = None
    ) -> None:
        self.size, self.setup = size, setup
        self._environment = {**_ENVIRONMENT, **(variables or {})}
        self._folder = tempfile.TemporaryDirectory(prefix="pool")
        self._root: Any = None
        self._connections: list[Connection] = []
        self._cases = 0
        # Before multiprocessing waits for its processes, which wait for us.
        atexit.register(self.stop)

    def run(self, case: str, ranks: int = 1, timeout: float = 60.0, **kwargs: Any) -> list[Any]:
        """What the function ``case`` returns on each of ``ranks`` ranks.

        Raises:
            CaseFailed: the processes are then ended, so that the next case finds new ones.
        """
        if not 1 <= ranks <= self.size:
            raise ValueError(f"ranks={ranks}: this pool has 1 to {self.size}")
        self._start()
        self._cases += 1
        folder = Path(self._folder.name, str(self._cases))
        folder.mkdir()
        connections = self._connections[:ranks]
        for connection in connections:
            connection.send((case, kwargs, ranks, timeout, str(folder)))
        answers = _collect(connections, timeout)
        if len(answers) == ranks and all(succeeded for succeeded, _ in answers.values()):
            return [answers[rank][1] for rank in range(ranks)]
        self.stop(kill=True)
        raise CaseFailed(_report(case, answers, ranks, folder))

    def _start(self) -> None:
        if self._connections:
            return
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(self.size)]
        self._connections = [ours for ours, _ in pairs]
        ends = [theirs for _, theirs in pairs]
        # Not daemonic: those may not start the helpers that saving a checkpoint needs.
        self._root = context.Process(target=_serve_all, args=(ends, self.setup))
        with mock.patch.dict(os.environ, self._environment):
            self._root.start()
        for end in ends:
            end.close()
        answers = _collect(self._connections, _START_SECONDS)
        if len(answers) < self.size or not all(succeeded for succeeded, _ in answers.values()):
            self.stop(kill=True)
            raise CaseFailed(_report("setup", answers, self.size, Path(self._folder.name)))

    def stop(self, kill: bool = False) -> None:
        """End the processes, at once where one may hang; the next case starts new ones."""
        for connection in self._connections:
            connection.close()
        if self._root is not None:
            self._root.join(0.0 if kill else _STOP_SECONDS)
            # The processes, and the helpers that saving a checkpoint starts.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._root.pid, signal.SIGKILL)
            self._root.kill()  # which may not have a group yet
            self._root.join()
        self._root, self._connections = None, []


def _collect(connections: list[Connection], timeout: float) -> dict[int, _Answer]:
    """Answers by rank; after the first failure the others have only a moment left."""
    answers: dict[int, _Answer] = {}
    pending = dict(zip(connections, range(len(connections)), strict=True))
    while pending:
        ready = wait(list(pending), timeout)
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending.pop(connection)
            try:
                answers[rank] = connection.recv()
            except (EOFError, ConnectionError):
                answers[rank] = (False, "the process died")
            if not answers[rank][0]:
                timeout = _GRACE_SECONDS
    return answers


def _report(case: str, answers: dict[int, _Answer], ranks: int, folder: Path) -> str:
    parts = [f"{case} failed"]
    for rank in range(ranks):
        succeeded, answer = answers.get(rank, (False, "no answer in time"))
        stack = folder / f"{rank}.stack"
        where = stack.read_text() if rank not in answers and stack.exists() else ""
        parts.append(f"-- rank {rank}: {'finished' if succeeded else answer}\n{where}")
    return "\n".join(parts)


def _serve_all(connections: list[Connection], setup: str | None) -> None:
    """Imports once, which takes seconds, then forks a process for each rank."""
    os.setpgrp()
    torch.set_num_threads(1)
    ready = _attempt(_function(setup)) if setup is not None else (True, None)
    # What the imports made stays; without it the collections below take no time.
    gc.freeze()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_serve, args=(rank, connections, ready))
        for rank in range(len(connections))
    ]
    for process in processes:
        process.start()
    for connection in connections:
        connection.close()
    for process in processes:
        process.join()


def _serve(rank: int, connections: list[Connection], ready: _Answer) -> None:
    """The life of one process: cases until the parent goes away."""
    connection = connections.pop(rank)
    for other in connections:  # which would hide that its own process has died
        other.close()
    connection.send(ready)
    while True:
        try:
            case, kwargs, ranks, timeout, folder = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        with open(f"{folder}/{rank}.stack", "w") as stack:
            faulthandler.dump_traceback_later(0.9 * timeout, file=stack)
            answer = _attempt(_run, case, kwargs, rank, ranks, timeout, folder)
            faulthandler.cancel_dump_traceback_later()
        connection.send(answer)


def _attempt(function: Callable[..., Any], *arguments: Any) -> _Answer:
    try:
        return True, function(*arguments)
    except BaseException:  # SystemExit is a failure too
        return False, traceback.format_exc()


def _run(
    case: str, kwargs: dict[str, Any], rank: int, ranks: int, timeout: float, folder: str
) -> Any:
    store = dist.FileStore(f"{folder}/store", ranks)
    limit = datetime.timedelta(seconds=2 * timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
    try:
        result = _function(case)(**kwargs)
        dist.barrier()
        return result
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        # A model and its process groups refer to each other, and each group has threads that spin.
        gc.collect()


def _function(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def megatron_on_host() -> None:
    """Setup for cases that use Megatron; nothing may have imported it before."""
    import logging
    import warnings

    from moa_megatron import host, patches

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    host.install()
    patches.apply()
    importlib.import_module("tests.helpers.training")
