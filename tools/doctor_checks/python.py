"""The interpreter, and variables that change what it and the libraries do."""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.doctor_checks.host import Finding, Host

# Variable -> (level, what it does). Values that stand for "off" are passed over.
_DANGEROUS = {
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": (
        "error",
        "torch.load then runs whatever code a checkpoint holds",
    ),
    "CUDA_LAUNCH_BLOCKING": ("warning", "every kernel waits for the one before: training crawls"),
    "NCCL_P2P_DISABLE": ("warning", "GPUs of a node talk through host memory, not NVLink or PCIe"),
    "NCCL_SHM_DISABLE": ("warning", "ranks of a node talk through the network"),
    "NCCL_IB_DISABLE": ("warning", "nodes talk over TCP although there may be InfiniBand"),
    "NCCL_ALGO": ("note", "NCCL may not choose the fastest algorithm"),
    "NCCL_PROTO": ("note", "NCCL may not choose the fastest protocol"),
    "TORCH_DISTRIBUTED_DEBUG": ("note", "DETAIL checks every collective, which costs time"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("warning", "every tensor asks the driver for memory"),
    "TORCHDYNAMO_DISABLE": ("note", "nothing is compiled"),
    "TRITON_INTERPRET": ("warning", "Triton's kernels run in Python, thousands of times slower"),
    "PYTHONHOME": ("error", "another installation's standard library may be used"),
    "LD_PRELOAD": ("warning", "a library comes before all others, in every process"),
}
_OFF = ("", "0", "false", "off", "no")


def version(host: Host) -> Iterator[Finding]:
    """The project is written for one minor version of Python."""
    running = host.facts.get("python", sys.version_info[:3])
    text = ".".join(map(str, running))
    wanted = (host.project / ".python-version").read_text().strip().split(".")[:2]
    if list(map(str, running[:2])) == wanted:
        yield Finding("ok", "python", f"{text} in {sys.executable}", value=text)
        return
    yield Finding(
        "error",
        "python",
        f"{text} in {sys.executable}; the project needs {'.'.join(wanted)}",
        "run it as .venv/bin/python tools/doctor.py, or ./launch/setup.sh first",
        text,
    )


def user_site(host: Host) -> Iterator[Finding]:
    """Packages in the home directory shadow the environment's, in containers above all."""
    folder = host.facts.get("user_site") or site.getusersitepackages()
    used = host.facts.get("user_site_used", folder in sys.path)
    if used:
        there = sorted(p.name for p in Path(folder).glob("*.dist-info"))
        yield Finding(
            "warning",
            "user packages",
            f"{folder} is on the path with {len(there)} packages, which shadow the environment's",
            "export PYTHONNOUSERSITE=1 (launch/local.sh and slurm.sbatch do)",
        )
    elif not host.env.get("PYTHONNOUSERSITE") and Path(folder).is_dir():
        yield Finding("note", "user packages", f"{folder} exists; this interpreter does not use it")
    else:
        yield Finding("ok", "user packages", "none on the path")


def python_path(host: Host) -> Iterator[Finding]:
    """Every folder on PYTHONPATH comes before the environment's packages."""
    ours = (str(host.project), "")
    entries = [p for p in host.env.get("PYTHONPATH", "").split(os.pathsep) if p not in ours]
    if entries:
        yield Finding(
            "warning" if any("site-packages" in entry for entry in entries) else "note",
            "PYTHONPATH",
            f"{os.pathsep.join(entries)} comes before the environment's packages",
            "unset PYTHONPATH, unless it is meant",
        )


def variables(host: Host) -> Iterator[Finding]:
    """Settings left over from a search for an error."""
    found = 0
    for name, (level, effect) in _DANGEROUS.items():
        value = host.env.get(name, "")
        if value.lower() in _OFF:
            continue
        found += level != "note"
        yield Finding(level, name, f"is {value!r}: {effect}", f"unset {name}")
    if host.env.get("NCCL_DEBUG", "").upper() in ("TRACE", "INFO"):
        found += 1
        yield Finding(
            "warning" if host.env["NCCL_DEBUG"].upper() == "TRACE" else "note",
            "NCCL_DEBUG",
            f"is {host.env['NCCL_DEBUG']!r}: every rank prints, TRACE for every collective",
            "unset NCCL_DEBUG; MOA_NCCL_DEBUG=INFO writes one file per rank",
        )
    if not found:
        yield Finding("ok", "variables", "none that slows a run down or weakens it")


def threads(host: Host) -> Iterator[Finding]:
    """The launchers share the cores among ranks; a value from elsewhere may not fit."""
    text = host.env.get("OMP_NUM_THREADS")
    cores = host.facts.get("cpus") or len(os.sched_getaffinity(0))
    if text is None:
        yield Finding("ok", "OMP_NUM_THREADS", "not set: the launchers share the cores")
    elif not text.isdigit() or int(text) < 1:
        yield Finding(
            "error", "OMP_NUM_THREADS", f"is {text!r}, no number", "unset OMP_NUM_THREADS"
        )
    elif int(text) > cores:
        yield Finding(
            "warning",
            "OMP_NUM_THREADS",
            f"is {text}, but a process may use {cores} CPUs: its threads wait for each other",
            "unset OMP_NUM_THREADS: the launchers share the cores among ranks",
        )
    else:
        yield Finding("ok", "OMP_NUM_THREADS", f"{text} of {cores} CPUs")


CHECKS = (version, user_site, python_path, variables, threads)
