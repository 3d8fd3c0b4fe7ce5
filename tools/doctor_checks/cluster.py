"""Slurm's settings that decide how a run survives, and what a container changes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from tools.doctor_checks.host import Finding, Host

# A save of a large model takes longer than Slurm's default of 30 s between SIGTERM and SIGKILL.
_SHORT_KILL_WAIT = 60
_MARKS = {
    "docker": "/.dockerenv",
    "podman": "/run/.containerenv",
    "Apptainer": "/.singularity.d",
    "enroot": "/etc/enroot-release",
}


def slurm(host: Host) -> Iterator[Finding]:
    """Where we are: on a login node, in a job, or away from Slurm."""
    job = host.env.get("SLURM_JOB_ID")
    found = host.has("sbatch")
    if job:
        nodes, tasks = host.env.get("SLURM_NNODES", "?"), host.env.get("SLURM_NTASKS", "?")
        yield Finding("ok", "Slurm", f"in job {job}: {nodes} nodes, {tasks} tasks in this step")
        yield from _tasks(host)
    elif found:
        yield Finding("ok", "Slurm", "sbatch is here; outside of a job")
    else:
        yield Finding("ok", "Slurm", "no sbatch: one machine, or inside a container")
    if found:
        yield from _configuration(host)
        yield from _partitions(host)


def _tasks(host: Host) -> Iterator[Finding]:
    gpus = host.env.get("SLURM_GPUS_ON_NODE") or host.env.get("SLURM_GPUS_PER_NODE", "")
    tasks = host.env.get("SLURM_NTASKS_PER_NODE", "")
    count = gpus.split(":")[-1]
    if count.isdigit() and tasks.isdigit() and int(tasks) not in (1, int(count)):
        yield Finding(
            "warning",
            "tasks",
            f"{tasks} tasks for {count} GPUs on a node",
            f"--ntasks-per-node=1 with torchrun, or {count} with one rank each",
        )


def _configuration(host: Host) -> Iterator[Finding]:
    shown = host.ask("scontrol", "show", "config")
    if shown is None:
        text = "scontrol does not answer: slurmctld is away, or this host may not ask"
        yield Finding("warning", "Slurm settings", text, "try again; scontrol ping")
        return
    table = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", shown, flags=re.MULTILINE))
    wait = re.match(r"\d+", table.get("KillWait", ""))
    if wait and int(wait[0]) < _SHORT_KILL_WAIT:
        yield Finding(
            "note",
            "KillWait",
            f"{wait[0]} s from SIGTERM to SIGKILL: a save may not end in time after scancel",
            "scancel --signal=USR1 JOB instead; --grace of submit.py covers the time limit",
        )
    if table.get("JobRequeue") == "0":
        yield Finding(
            "warning",
            "JobRequeue",
            "0: jobs are not requeued after a node failure unless they ask",
            "submit.py's script asks (--requeue); use --chain where the site forbids it",
        )
    mode = table.get("PreemptMode", "OFF")
    if "CANCEL" in mode:
        yield Finding(
            "warning",
            "PreemptMode",
            f"{mode}: preempted jobs are not requeued",
            "submit.py --chain K",
        )
    elif "SUSPEND" in mode:
        text = f"{mode}: a suspended run times out in its collectives"
        yield Finding("note", "PreemptMode", text, "choose a partition that requeues")
    array = table.get("MaxArraySize", "")
    if array.isdigit():
        level = "note" if int(array) < 100 else "ok"
        text = f"{array}: sweeps have at most {max(int(array) - 1, 0)} points"
        yield Finding(level, "MaxArraySize", text)
    version = table.get("SLURM_VERSION", "")
    yield Finding("ok", "Slurm settings", f"version {version or 'unknown'}", value=version or None)


def _partitions(host: Host) -> Iterator[Finding]:
    shown = host.ask("sinfo", "--noheader", "--format=%P|%a|%l|%D|%G")
    lines = [line.split("|") for line in (shown or "").splitlines() if line.count("|") == 4]
    up = [words for words in lines if words[1] == "up"]
    if shown is not None and not up:
        yield Finding("warning", "partitions", "none is up", "ask the administrator")
    for name, _, limit, nodes, gres in up[:8]:
        text = f"{nodes} nodes, at most {limit}, {gres}"
        yield Finding("ok", f"partition {name.rstrip('*')}", text)


def container(host: Host) -> Iterator[Finding]:
    """What a container hides and what it lets through."""
    kind = kind_of(host)
    if kind is None:
        yield Finding("ok", "container", "none", value="none")
        return
    image = host.env.get("APPTAINER_CONTAINER") or host.env.get("SINGULARITY_CONTAINER") or ""
    yield Finding("ok", "container", f"{kind} {image}".strip(), value=kind)
    root = next(
        (
            w
            for w in map(str.split, (host.read("/proc/mounts") or "").splitlines())
            if w[1:2] == ["/"]
        ),
        None,
    )
    if root and "ro" in root[3].split(","):
        yield Finding("note", "root", "is read-only: only mounts and /tmp can be written")
    home = Path(host.env.get("HOME") or "/")
    mounted = str(home) != "/" and host.mount_of(home)[1] not in ("", "/")
    local = host.root / str(home / ".local" / "lib").lstrip("/")
    if mounted and local.is_dir() and not host.env.get("PYTHONNOUSERSITE"):
        yield Finding(
            "warning",
            "home",
            f"{home} of the host is mounted, and {home}/.local holds packages",
            "export PYTHONNOUSERSITE=1, or leave it out: --no-container-mount-home (pyxis), "
            "--no-home (Apptainer)",
        )
    if not os.access(host.root / str(home).lstrip("/"), os.W_OK):
        text = f"{home} cannot be written: caches go elsewhere or nowhere"
        yield Finding("note", "home", text, "export XDG_CACHE_HOME=/a/writable/folder")


def kind_of(host: Host) -> str | None:
    """Name of the container's runtime; None outside of one."""
    for name, mark in _MARKS.items():
        if (host.root / mark.lstrip("/")).exists():
            return name
    if host.env.get("APPTAINER_CONTAINER") or host.env.get("SINGULARITY_CONTAINER"):
        return "Apptainer"
    if host.env.get("ENROOT_ROOTFS") or host.env.get("PYXIS_RUNTIME"):
        return "enroot"
    said = host.read("/proc/1/cgroup") or ""
    return next((n for n in ("docker", "podman", "kubepods", "containerd") if n in said), None)


CHECKS = (slurm, container)
