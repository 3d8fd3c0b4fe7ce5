"""Slurm's commands: what submits jobs and asks after them.

Standard library only: it runs on a login node.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from moa_megatron.recipes import RefusedError


def sbatch(script: Path, *words: str, chain: str = "") -> str:
    """Submits a script; returns the id of its job.

    Raises:
        RefusedError: with Slurm's own words.
    """
    environment = {**os.environ, "MOA_CHAIN": chain}
    done = subprocess.run(
        ["sbatch", "--parsable", *words, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RefusedError(f"sbatch: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def submit_chain(folder: Path, count: int) -> list[str]:
    """``count`` jobs of a run, each after all before it; returns their ids."""
    chain = f"{folder.name}-{int(time.time())}"
    jobs: list[str] = []
    # Held until the chain is written down: a short first job must find its successors.
    hold = ["--hold"] if count > 1 else []
    for _ in range(count):
        after = [f"--dependency=afterany:{':'.join(jobs)}"] if jobs else hold
        jobs.append(sbatch(folder / "job.sbatch", *after, chain=chain))
    note_jobs(folder, jobs)
    if hold:
        subprocess.run(["scontrol", "release", jobs[0]], check=True)
    return jobs


def submit_sweep(folder: Path, indices: list[int] | None = None) -> list[str]:
    """The array of a sweep, and behind it the report; ``indices``: these points only."""
    only = [] if indices is None else [f"--array={','.join(map(str, indices))}"]
    array = sbatch(folder / "job.sbatch", *only)
    jobs = [array, sbatch(folder / "report.sbatch", f"--dependency=afterany:{array}")]
    note_jobs(folder, jobs)
    return jobs


def note_jobs(folder: Path, jobs: list[str]) -> None:
    """``chain.json``: what the supervisor cancels when nothing is left to do."""
    (folder / "chain.json").write_text(json.dumps({"jobs": jobs}) + "\n", encoding="utf-8")


def active_jobs(folder: Path) -> list[str]:
    """Jobs of a run's chain that Slurm still knows as waiting or running."""
    try:
        jobs = json.loads((folder / "chain.json").read_text(encoding="utf-8"))["jobs"]
        shown = subprocess.run(
            ["squeue", "--noheader", "--format=%A", "--jobs", ",".join(jobs)],
            capture_output=True,
            text=True,
            check=False,
        )
    except (OSError, ValueError, KeyError):
        return []
    return sorted(set(shown.stdout.split()), key=int)
