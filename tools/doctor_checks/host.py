"""What checks look at, in one place, so that tests can make it up: files, variables, commands."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
LEVELS = ("ok", "note", "warning", "error")
# Shared over the network: slow for many small files, and a lock or a rename may be seen late.
NETWORK_TYPES = frozenset(
    ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "wekafs", "panfs", "afs")
    + ("orangefs", "pvfs2", "9p", "glusterfs", "virtiofs", "daos", "vastnfs", "fuse.sshfs")
    + ("fuse.juicefs", "fuse.glusterfs", "fuse.daos", "fuse.dfuse", "fuse.ceph", "fuse.s3fs")
    + ("fuse.ceph-fuse", "fuse.gcsfuse", "fuse.quobyte")
)
MEMORY_TYPES = ("tmpfs", "ramfs")


@dataclass
class Finding:
    """One answer. ``value`` is what nodes of a job are compared by."""

    level: str
    check: str
    message: str
    cure: str = ""
    value: str | None = None
    group: str = ""


Check = Callable[["Host"], Iterator[Finding]]


@dataclass
class Host:
    """A machine. Tests give ``root`` a folder with a proc and a sys, and answers for commands."""

    root: Path = Path("/")
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    # Command line -> what it prints; None: commands are run.
    answers: Mapping[str, str] | None = None
    run_dir: Path = PROJECT / "runs"
    project: Path = PROJECT
    recipe: str | None = None
    # The recipe's values with the flags' over them.
    values: dict[str, Any] = field(default_factory=dict)
    # Subprocesses that import torch and Megatron, which take seconds each.
    imports: bool = True
    facts: dict[str, Any] = field(default_factory=dict)

    def read(self, path: str) -> str | None:
        """A small file below ``root``, stripped; None where it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text(errors="replace").strip()
        except OSError:
            return None

    def names(self, folder: str) -> list[str]:
        """What a folder below ``root`` holds."""
        try:
            return sorted(os.listdir(self.root / folder.lstrip("/")))
        except OSError:
            return []

    def has(self, command: str) -> bool:
        if self.answers is not None:
            return any(line.split()[0] == command for line in self.answers)
        return shutil.which(command, path=self.env.get("PATH")) is not None

    def ask(self, *words: str, limit: float = 10) -> str | None:
        """What a command prints; None where it is missing, fails or takes too long."""
        if self.answers is not None:
            return self.answers.get(" ".join(words))
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
            return None
        return done.stdout if done.returncode == 0 else None

    def mount_of(self, path: Path) -> tuple[str, str]:
        """(type, mount point) of the file system that holds ``path``, or will."""
        wanted, best = str(_resolved(path)), ("", "")
        for line in (self.read("/proc/mounts") or "").splitlines():
            words = line.split()
            if len(words) < 3:
                continue
            point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), words[1])
            inside = wanted == point or wanted.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best[1]):  # a later mount hides an earlier one
                best = (words[2], point)
        return best

    def is_network(self, path: Path) -> bool:
        """Whether other nodes may see the file system of ``path`` too."""
        return self.mount_of(path)[0] in NETWORK_TYPES

    def addresses_of(self, name: str) -> list[str]:
        """What a host name resolves to."""
        if "addresses" in self.facts:
            return list(self.facts["addresses"].get(name, []))
        try:
            found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
        except OSError:
            return []
        return sorted(found)

    def name(self) -> str:
        return self.env.get("SLURMD_NODENAME") or self.facts.get("hostname") or socket.gethostname()


@dataclass
class Probe:
    """How an attempt in another process went."""

    ok: bool
    output: str
    last_line: str
    seconds: float
    timed_out: bool = False


def attempt(
    code: str, limit: float, cwd: Path = PROJECT, env: dict[str, str] | None = None
) -> Probe:
    """Runs Python code in a process of its own: a crash or a hang in it is only a finding."""
    start = time.monotonic()
    words: Sequence[str] = (sys.executable, "-W", "ignore", "-c", code)
    with subprocess.Popen(
        words,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return Probe(False, "", f"not done after {limit:g} s", limit, timed_out=True)
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {process.returncode}"
    return Probe(process.returncode == 0, out, last, time.monotonic() - start)


def existing(path: Path) -> Path:
    """``path``, or the nearest of its parents that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def size(count: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return path
