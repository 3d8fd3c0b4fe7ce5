"""Slurm's commands: what submits jobs, asks after them, and tells why one ends.

Standard library only: it runs on login and batch hosts, outside the container.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from datetime import datetime
from pathlib import Path


class SlurmError(RuntimeError):
    """Slurm refused, in its own words."""


def own_job() -> str:
    """What scontrol and scancel call this job; empty outside one.

    An element of an array: its SLURM_JOB_ID may be the id of the whole array.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def fields(job: str) -> dict[str, str]:
    """A job as ``scontrol show job`` sees it now; empty without Slurm."""
    if not job:
        return {}
    shown = subprocess.run(
        ["scontrol", "show", "job", "-o", job],
        env={**os.environ, "SLURM_TIME_FORMAT": "standard"},
        capture_output=True,
        text=True,
        check=False,
    )
    return dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)


def is_cancelled(job: dict[str, str]) -> bool:
    """Whether a job that is ending does so because someone cancelled it.

    Slurm says COMPLETING whatever the reason. A time limit leaves its name, a preemption its time,
    a requeue (also of a failed node) no end; a cancellation leaves none of them.
    """
    return (
        job.get("JobState") in ("CANCELLED", "COMPLETING")
        and job.get("Reason") == "None"
        and not is_preempted(job)
        and job.get("EndTime") != "Unknown"
    )


def is_preempted(job: dict[str, str]) -> bool:
    """Whether another job has taken this one's place."""
    return job.get("PreemptTime", "None") != "None"


def seconds_left(job: dict[str, str]) -> float:
    """Until the time limit; infinite without one."""
    try:
        return datetime.fromisoformat(job["EndTime"]).timestamp() - time.time()
    except (KeyError, ValueError):
        return float("inf")


def sbatch(script: Path, *words: str) -> str:
    """Submits a script; returns the id of its job.

    Raises:
        SlurmError: where Slurm refuses it.
    """
    done = subprocess.run(
        ["sbatch", "--parsable", *words, str(script)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SlurmError(f"sbatch: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def submit_chain(folder: Path, count: int) -> list[str]:
    """``count`` jobs of a run, each after all before it; returns their ids.

    Raises:
        SlurmError: where Slurm refuses one of them; none is left then.
    """
    jobs: list[str] = []
    # Held until the chain is written down: a short first job must find its successors.
    hold = ["--hold"] if count > 1 else []
    try:
        for _ in range(count):
            after = [f"--dependency=afterany:{':'.join(jobs)}"] if jobs else hold
            jobs.append(sbatch(folder / "job.sbatch", *after))
        note_jobs(folder, jobs)
        if hold:
            release(jobs[0])
    except (SlurmError, OSError):
        cancel(jobs)
        raise
    return jobs


def release(job: str) -> None:
    """Lets a held job start.

    Raises:
        SlurmError: where Slurm refuses.
    """
    done = subprocess.run(["scontrol", "release", job], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SlurmError(f"scontrol release {job}: {done.stderr.strip()}")


def submit_sweep(folder: Path, elements: str | None = None) -> list[str]:
    """The array of a sweep, and behind it the report; ``elements``: these only, ``1,3%2``.

    A refused report is said, not raised: the array trains, and the report can be made by hand.

    Raises:
        SlurmError: where Slurm refuses the array.
    """
    jobs = [sbatch(folder / "job.sbatch", *([f"--array={elements}"] if elements else []))]
    note_jobs(folder, jobs)
    try:
        jobs.append(sbatch(folder / "report.sbatch", f"--dependency=afterany:{jobs[0]}"))
    except SlurmError as error:
        print(f"note: no report will follow ({error}): tools/report_sweep.py {folder} makes it")
    note_jobs(folder, jobs)
    return jobs


def note_jobs(folder: Path, jobs: list[str]) -> None:
    """``chain.json``: the jobs of a submission, which count their attempts together."""
    chain = f"{folder.name}-{int(time.time())}"
    (folder / "chain.json").write_text(json.dumps({"chain": chain, "jobs": jobs}) + "\n", "utf-8")


def noted_jobs(folder: Path) -> tuple[str, list[str]]:
    """Name and jobs of the last submission; empty where there was none."""
    try:
        chain = json.loads((folder / "chain.json").read_text(encoding="utf-8"))
        return chain["chain"], chain["jobs"]
    except (OSError, ValueError, KeyError):
        return "", []


def active_jobs(folder: Path) -> list[str]:
    """Jobs of the last submission that Slurm still knows as waiting or running.

    Raises:
        SlurmError: where Slurm does not answer; a folder in use must not get a second chain.
    """
    jobs = noted_jobs(folder)[1]
    if not jobs:
        return []
    try:
        shown = subprocess.run(
            ["squeue", "--noheader", "--format=%A", "--jobs", ",".join(jobs)],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return []  # no Slurm here: nothing can be submitted either
    if shown.returncode and "Invalid job id" not in shown.stderr:
        raise SlurmError(f"squeue: {shown.stderr.strip()}; try again")
    return sorted(set(shown.stdout.split()), key=int)


def cancel(jobs: list[str]) -> None:
    """Cancels jobs; those that have ended are no error."""
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True, check=False)
