"""Disks: room, kind of file system, whether a write stays, caches of compiled kernels."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tools.doctor_checks.host import MEMORY_TYPES, Finding, Host, existing, size

_LITTLE, _FULL = 50 << 30, 1 << 30
_FEW_INODES = 10_000
_SLOW_SECONDS = 0.5
_LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def caches(host: Host) -> Iterator[Finding]:
    """Kernels are compiled by every rank into these; a shared disk makes all of them wait."""
    home = Path(host.env.get("HOME") or "/nonexistent")
    base = Path(host.env.get("XDG_CACHE_HOME") or home / ".cache")
    named = bool(host.env.get("XDG_CACHE_HOME"))
    user = host.env.get("USER") or str(os.getuid())
    # As launch/env.sh places them where XDG_CACHE_HOME is set, else as the libraries do.
    triton = base / "triton" if named else home / ".triton" / "cache"
    inductor = Path(tempfile.gettempdir()) / f"torchinductor_{user}"
    inductor = base / "inductor" if named else inductor
    folders = (
        ("XDG_CACHE_HOME", base),
        ("kernels of this project", base / "moa_megatron"),
        ("TRITON_CACHE_DIR", Path(host.env.get("TRITON_CACHE_DIR") or triton)),
        ("TORCHINDUCTOR_CACHE_DIR", Path(host.env.get("TORCHINDUCTOR_CACHE_DIR") or inductor)),
    )
    if not named and not _writable(base):
        text = f"{base} cannot be written; the launchers use a folder in /tmp, which may not last"
        cure = "export XDG_CACHE_HOME=/a/writable/folder"
        yield Finding("warning", "XDG_CACHE_HOME", text, cure)
        return
    ranks = int(host.env.get("SLURM_NTASKS", "1") or 1)
    for name, folder in folders:
        variable = name if name.isupper() else "XDG_CACHE_HOME"
        if not _writable(folder):
            yield Finding(
                "error" if variable == "XDG_CACHE_HOME" else "warning",
                name,
                f"{folder} cannot be written: kernels are built anew, or not at all",
                f"export {variable}=/a/writable/folder",
            )
        elif host.is_network(folder) and name != "XDG_CACHE_HOME":
            kind = host.mount_of(folder)[0]
            yield Finding(
                "warning" if ranks > 1 else "note",
                name,
                f"{folder} is on {kind}, which nodes share: ranks that compile wait for each other",
                f"export {variable}=/a/disk/of/the/node (such as /tmp/$USER/cache)",
            )
        else:
            yield Finding("ok", name, f"{folder} ({host.mount_of(folder)[0] or 'unknown'})")


def room(host: Host) -> Iterator[Finding]:
    """Room and files left where the run writes; the first save is a bad time to find out."""
    place = existing(host.run_dir)
    state = host.facts.get("statvfs") or os.statvfs(place)
    free, nodes = state.f_bavail * state.f_frsize, state.f_favail
    kind = host.mount_of(host.run_dir)[0] or "unknown"
    cure = "free some, or name another folder with --run-dir"
    level = "error" if free < _FULL else "warning" if free < _LITTLE else "ok"
    text = f"{size(free)} free for {host.run_dir} ({kind})"
    yield Finding(level, "free disk", text, "" if level == "ok" else cure)
    if state.f_files and nodes < _FEW_INODES:
        yield Finding("error", "inodes", f"only {nodes} more files for {host.run_dir}", cure)


def location(host: Host) -> Iterator[Finding]:
    """Nodes of a run write into one folder: a disk of one node will not do."""
    path = str(host.run_dir.absolute())
    kind = host.mount_of(host.run_dir)[0]
    nodes = int(host.env.get("SLURM_NNODES", host.env.get("SLURM_JOB_NUM_NODES", "1")) or 1)
    local = kind in MEMORY_TYPES or path.startswith(tuple(f"{f}/" for f in _LOCAL_FOLDERS))
    cure = "name a folder on the shared file system with --run-dir"
    if kind in MEMORY_TYPES:
        text = f"{path} is on {kind}: it is lost with the machine and takes its memory"
        yield Finding("warning", "run folder", text, "name a folder on a disk with --run-dir")
    elif nodes > 1 and local:
        yield Finding("error", "run folder", f"{path}: each of {nodes} nodes has its own", cure)
    elif nodes > 1 and not host.is_network(host.run_dir):
        text = f"{path} is on {kind or 'an unknown file system'}, which looks local to this node"
        yield Finding("warning", "run folder", text, cure + ", unless all nodes see this one")
    else:
        where = "shared" if host.is_network(host.run_dir) else "local"
        yield Finding("ok", "run folder", f"{path} is on a {where} file system ({kind})")


def write(host: Host) -> Iterator[Finding]:
    """Writes, syncs, renames and reads a file, as saving does."""
    place = existing(host.run_dir)
    payload = os.urandom(1 << 20)
    name = f".doctor-{host.name()}-{os.getpid()}"
    first, second = place / name, place / f"{name}.renamed"
    start = time.perf_counter()
    try:
        with first.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(first, second)
        same = second.read_bytes() == payload
    except OSError as error:
        text = f"in {place}: {error.strerror or error}"
        yield Finding("error", "write", text, "make it writable, or name another with --run-dir")
        return
    finally:
        for path in (first, second):
            path.unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    if not same:
        text = f"in {place}: what was read is not what was written"
        yield Finding("error", "write", text, "do not train on this disk; tell its administrator")
    elif seconds > _SLOW_SECONDS:
        text = f"1 MiB written, synced, renamed and read in {place} took {seconds:.1f} s"
        yield Finding("warning", "write", text, "a busy or failing disk: try another --run-dir")
    else:
        text = f"1 MiB written, synced, renamed, read in {seconds * 1000:.0f} ms"
        yield Finding("ok", "write", f"{text} in {place}")


def _writable(folder: Path) -> bool:
    """By writing: access rights alone say nothing of read-only mounts and quotas."""
    place = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
            return True
    except OSError:
        return False


CHECKS = (caches, room, location, write)
