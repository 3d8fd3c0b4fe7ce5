"""Runs Slurm's daemons until its standard input closes, then leaves nothing behind.

    python slurm_keeper.py FOLDER NODE...    # as tests/helpers/slurm.py starts it

A process of its own, since tests can be killed: the kernel closes the pipe then too. It is the
reaper of everything below it, so processes of jobs cannot escape by outliving their parents.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_SOCKET_SECONDS = 30.0


def main(folder: Path, nodes: list[str]) -> int:
    """Returns once everything is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGCHLD, _reap)
    try:
        _start(folder, nodes)
        while os.read(sys.stdin.fileno(), 1024):
            pass
    finally:
        _kill_everything()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _start(folder: Path, nodes: list[str]) -> None:
    files = {
        "--key-file": "munge.key",
        "--socket": "munge.socket",
        "--pid-file": "munge.pid",
        "--log-file": "munge.log",
        "--seed-file": "munge.seed",
    }
    options = [f"{option}={folder / name}" for option, name in files.items()]
    _daemon(folder, ["munged", "--foreground", *options])
    deadline = time.monotonic() + _SOCKET_SECONDS
    while not (folder / "munge.socket").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    _daemon(folder, ["slurmctld", "-D"])
    for node in nodes:
        _daemon(folder, ["slurmd", "-D", "-N", node])


def _daemon(folder: Path, command: list[str]) -> None:
    with (folder / "daemons.log").open("a") as log:
        # A session each, as init would give them: jobs must not share ours.
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _reap(*_: object) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _kill_everything() -> None:
    """Until nothing is left: what dies may have started something just before."""
    while children := psutil.Process().children(recursive=True):
        for process in children:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.02)
        _reap()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
