"""What this process may use: CPUs, memory, open files, locked memory, shared memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

from tools.doctor_checks.host import Finding, Host, size

_FEW_FILES, _FEW_PROCESSES, _SMALL_STACK = 4096, 1024, 1 << 20
_SMALL_SHM = 1 << 30
# A cgroup without a limit of memory says so with a number near 2^63 in version 1.
_NO_LIMIT = 1 << 60


def cpus(host: Host) -> Iterator[Finding]:
    """A Slurm step gets one core for each task unless it asks for more."""
    online = host.facts.get("online") or os.cpu_count() or 1
    allowed = host.facts.get("cpus") or len(os.sched_getaffinity(0))
    quota = _cpu_quota(host)
    text = f"{allowed} of {online} usable"
    if quota is not None and quota < allowed:
        yield Finding(
            "warning" if quota < 2 else "note",
            "CPU quota",
            f"the cgroup grants {quota:.1f} CPUs of {allowed}: threads beyond that are stopped",
            "ask for more CPUs (docker --cpus, Slurm --cpus-per-task)",
        )
    if allowed == 1 and online > 1:
        in_job = "SLURM_JOB_ID" in host.env
        yield Finding(
            "warning",
            "CPUs",
            f"{text}: data loading and every thread of the rank share one core",
            "srun --cpu-bind=none --cpus-per-task=N (launch/slurm.sbatch does); a step does not "
            "inherit the job's CPUs"
            if in_job
            else "taskset -cp shows what bound this process",
        )
    else:
        yield Finding("ok", "CPUs", text, value=str(allowed))


def memory(host: Host) -> Iterator[Finding]:
    """A cgroup may grant less than the machine has; beyond it ranks are killed without a word."""
    lines = (host.read("/proc/meminfo") or "").splitlines()
    table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    total, free = table.get("MemTotal", 0), table.get("MemAvailable", 0)
    granted = _memory_limit(host)
    if granted is not None and granted < 0.9 * total:
        yield Finding(
            "warning" if granted < total / 4 else "note",
            "memory limit",
            f"the cgroup grants {size(granted)} of the machine's {size(total)}",
            "Slurm: --mem=0 --exclusive; docker: --memory; else ranks are killed when it is full",
        )
    if total and free < total / 10:
        yield Finding(
            "warning",
            "memory",
            f"{size(free)} of {size(total)} free",
            "see what runs here: ps aux --sort=-rss | head",
        )
    else:
        yield Finding("ok", "memory", f"{size(free)} of {size(total)} free")


def _cgroup_folders(host: Host, controller: str) -> list[str]:
    """Folders with the limits of this process, its own cgroup first, then its parents."""
    folders = []
    for line in (host.read("/proc/self/cgroup") or "").splitlines():
        number, names, path = line.split(":", 2)
        if number == "0":
            bases = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        elif controller in names.split(","):
            bases = [f"/sys/fs/cgroup/{controller}", f"/sys/fs/cgroup/{names}"]
        else:
            continue
        while True:
            folders += [base + path.rstrip("/") for base in bases]
            if path in ("/", ""):
                break
            path = os.path.dirname(path)
    return folders


def _cpu_quota(host: Host) -> float | None:
    quotas = []
    for folder in _cgroup_folders(host, "cpu"):
        words = (host.read(f"{folder}/cpu.max") or "").split()
        if len(words) != 2:
            words = [
                host.read(f"{folder}/cpu.cfs_quota_us") or "",
                host.read(f"{folder}/cpu.cfs_period_us") or "",
            ]
        if all(word.isdigit() and int(word) for word in words):  # "max" and -1: no limit
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _memory_limit(host: Host) -> int | None:
    granted = []
    for folder in _cgroup_folders(host, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = host.read(f"{folder}/{name}") or ""
            if text.isdigit() and int(text) < _NO_LIMIT:
                granted.append(int(text))
    return min(granted, default=None)


def ulimits(host: Host) -> Iterator[Finding]:
    """Limits whose excess shows as an error far away from its cause."""
    wanted = (
        (
            "open files",
            "RLIMIT_NOFILE",
            _FEW_FILES,
            "ulimit -n 65536",
            "loaders and NCCL open many",
        ),
        (
            "processes",
            "RLIMIT_NPROC",
            _FEW_PROCESSES,
            "ulimit -u 65536",
            "ranks start many threads",
        ),
        ("stack", "RLIMIT_STACK", _SMALL_STACK, "ulimit -s 8192", "compilers overflow it"),
    )
    low = 0
    for name, key, least, cure, why in wanted:
        soft, hard = _limit(host, key)
        if soft != resource.RLIM_INFINITY and soft < least:
            low += 1
            more = (
                "" if hard == resource.RLIM_INFINITY or hard >= least else " (hard limit: ask root)"
            )
            yield Finding("warning", name, f"at most {soft}: {why}", cure + more)
    soft, _ = _limit(host, "RLIMIT_MEMLOCK")
    if soft != resource.RLIM_INFINITY and host.names("/sys/class/infiniband"):
        low += 1
        yield Finding(
            "error" if soft < 1 << 26 else "warning",
            "locked memory",
            f"at most {size(soft)}, with RDMA devices here: NCCL cannot register its buffers",
            "ulimit -l unlimited; in Slurm PropagateResourceLimitsExcept=MEMLOCK, docker "
            "--ulimit memlock=-1",
        )
    if not low:
        files = _limit(host, "RLIMIT_NOFILE")[0]
        count = "any number of" if files == resource.RLIM_INFINITY else str(files)
        yield Finding("ok", "ulimits", f"{count} open files; nothing too low")


def _limit(host: Host, key: str) -> tuple[int, int]:
    given = host.facts.get(key)
    return given if given is not None else resource.getrlimit(getattr(resource, key))


def shared_memory(host: Host) -> Iterator[Finding]:
    """NCCL's ranks of a node and DataLoader's workers meet in /dev/shm."""
    given = host.facts.get("shm")
    try:
        if given is None:
            state = os.statvfs("/dev/shm")
            given = (state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize)
    except OSError:
        given = (0, 0)
    total, free = given
    cure = "docker run --ipc host (or --shm-size 16g)"
    if total == 0:
        yield Finding("error", "/dev/shm", "is not there: NCCL and DataLoader need it", cure)
    elif total < _SMALL_SHM or free < _SMALL_SHM // 4:
        text = f"{size(free)} of {size(total)} free: NCCL or DataLoader will die with a bus error"
        level = "error" if free < 1 << 26 else "warning"
        yield Finding(
            level,
            "/dev/shm",
            text,
            cure if total < _SMALL_SHM else "ls -l /dev/shm; remove what ended runs left",
        )
    else:
        yield Finding("ok", "/dev/shm", f"{size(free)} of {size(total)} free")


CHECKS = (cpus, memory, ulimits, shared_memory)
