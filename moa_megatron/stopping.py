"""Signals that ask a run to save and stop: SIGTERM, SIGUSR1, SIGUSR2 and the first Ctrl-C.

Megatron compares the time a run has taken with ``args.exit_duration_in_mins``, on all ranks
together, after every step and every batch of an evaluation, and saves and ends the run once one
rank is past it. A signal on any rank moves that limit below zero; one that arrives during set-up
or a save waits for the next comparison. Megatron's own ``--exit-signal-handler`` hears one signal
only, listens from the end of set-up on, and is deaf during evaluations; what it does for the
workers that load data stays in use.

Must be importable before torch: ``install`` runs before the slow imports.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_NOW = -1.0  # minutes; any time is past it
_PR_SET_PDEATHSIG = 1

_process = 0
_request: str | None = None
_args: argparse.Namespace | None = None


def install() -> None:
    """Listens from here on; without ``bind`` a signal is only remembered."""
    global _process
    _process = os.getpid()
    for number in _HEARD:
        signal.signal(number, _receive)


def requested() -> str | None:
    """Name of the first signal that asked this process to stop, such as ``SIGUSR1``."""
    return _request


def bind(args: argparse.Namespace, upstream: Any) -> None:
    """Lets signals, also those already received, end the run of these arguments.

    Args:
        args: Megatron's namespace, changed in place: the limit must be set on every rank, or some
            would not take part in the comparison.
        upstream: the handler that ``args.exit_signal_handler`` made Megatron install. Only where
            that is set do data loaders' workers survive SIGTERM, which Slurm sends to all
            processes of a job; the signal itself is heard here, and gathered once.
    """
    global _args
    if not _process:
        return
    _args = args
    install()
    upstream.signals_received = lambda: [False]
    args.exit_duration_in_mins = args.exit_duration_in_mins or math.inf
    if _request is not None:
        args.exit_duration_in_mins = _NOW


def deafen() -> None:
    """From here to the end of the process signals are ignored: what was asked for is done.

    Python's own shutdown would put the default in place of our handler, and a late signal would
    turn a saved run into a killed one.
    """
    for number in _HEARD if _process else ():
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """Ends this process when its launcher dies, even by SIGKILL: no rank outlives the others."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def start_shielded(start: Callable[[], object]) -> None:
    """Runs what spawns a process, with the signals blocked: the process inherits that.

    Between its start and ``serve_parent`` a signal to the whole step would kill it. Those that come
    to this process meanwhile are delivered afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD if _process else ())
    try:
        start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve_parent() -> None:
    """For processes that a rank spawns to write checkpoints: they live exactly as long as it does.

    Slurm's signals reach them too; dying of one would break the very save it asks for. And the rank
    may be killed, whereupon nobody would end them.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    # Not die_with_parent: that would also fire when only the thread that spawned us ends.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _receive(number: int, frame: FrameType | None) -> None:
    global _request
    del frame
    # Writers of checkpoints and loaders of data are forked with this handler; Slurm signals them
    # too, and they must finish their work.
    if os.getpid() != _process:
        return
    name = signal.Signals(number).name
    if number == signal.SIGINT and _request == name:
        raise KeyboardInterrupt
    if _request is None and os.environ.get("RANK", "0") == "0":
        again = "; Ctrl-C again quits at once" if number == signal.SIGINT else ""
        os.write(2, f"{name}: saving and stopping after this step{again}\n".encode())
    _request = _request or name
    if _args is not None:
        _args.exit_duration_in_mins = _NOW
