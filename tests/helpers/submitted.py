"""Runs that are submitted to the test cluster as a user submits them, in small."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_megatron.attempts import History
from tests.e2e.runs import ROOT, SMALL_MOE, environment
from tests.helpers.slurm import Cluster

# Two ranks on two nodes, steps of about a tenth of a second.
TWO_RANKS = [*SMALL_MOE, "--expert-model-parallel-size", "2", "--save-interval", "100000"]
_CPU = ["--gpus-per-node", "0", "--sbatch", "mem=100", "--time", "10", "--grace", "60"]


@dataclass
class Submitted:
    """A run, or a sweep, that ``launch/submit.py`` has handed to the cluster."""

    cluster: Cluster
    folder: Path
    jobs: list[str]
    output: str

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.folder / "status.json").read_text())  # type: ignore[no-any-return]

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return History(self.folder).read()

    def log(self) -> str:
        """Output of all jobs so far."""
        files = sorted((self.folder / "logs").glob("slurm-*.out"))
        return "".join(file.read_text(errors="replace") for file in files)

    def wait_for(self, pattern: str, timeout: float = 120) -> None:
        """Until a regular expression is found in the output of the jobs."""
        _wait(self.log, pattern, timeout)

    def wait_for_file(self, path: Path, pattern: str, timeout: float = 120) -> None:
        """Until a regular expression is found in a file, which may not be there yet."""
        _wait(lambda: path.read_text() if path.exists() else "", pattern, timeout)

    def wait_for_step(self, step: int, timeout: float = 120) -> None:
        """Until a step has been logged, in whichever job."""
        self.wait_for(rf"iteration +{step}/", timeout=timeout)

    def wait(self, timeout: float = 180) -> list[str]:
        """States of all jobs, once every one has ended."""
        return [self.cluster.wait(job, timeout)["JobState"] for job in self.jobs]

    def orphans(self) -> list[int]:
        """Processes of this run that are still alive two seconds after its end."""
        time.sleep(2)  # what a rank has spawned looks for it every second
        return self.cluster.processes(str(self.folder))


def _wait(read: Callable[[], str], pattern: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not re.search(pattern, text := read()):
        if time.monotonic() > deadline:
            raise AssertionError(f"no {pattern!r} in {timeout} s:\n{text[-6000:]}")
        time.sleep(0.3)


def call(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    """``./launch/submit.py`` with these words."""
    return subprocess.run(
        [str(ROOT / "launch" / "submit.py"), *words],
        env={**environment(), **{k: cluster.env[k] for k in ("SLURM_CONF", "PATH")}},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def submit(cluster: Cluster, folder: Path, recipe: str, *words: str) -> Submitted:
    """Submits without Megatron's check, which has a test of its own and takes ten seconds."""
    done = call(cluster, recipe, *_CPU, "--no-check", "--run-dir", str(folder), *words)
    assert done.returncode == 0, done.stderr
    jobs = re.search(r"submitted job ([\d, ]+)", done.stdout)
    assert jobs is not None, done.stdout
    return Submitted(cluster, folder, jobs[1].split(", "), done.stdout)
