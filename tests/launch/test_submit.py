"""launch/submit.py against a real Slurm: what it refuses, prints, submits; sweeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.slurm import Cluster
from tests.helpers.submitted import SMALL_MOE, call, submit

POINTS = ("seed=1", "seed=2")
CPU = ["--gpus-per-node", "0", "--sbatch", "mem=100"]


def test_dry_run_shows_plan_and_script_and_submits_nothing(cluster: Cluster, shared: Path) -> None:
    before = len(cluster.jobs())
    words = ["tiny-moe", *SMALL_MOE, *CPU, "--procs-per-node", "2", "--chain", "3"]
    done = call(cluster, *words, "--run-dir", str(shared / "dry"), "--dry-run")
    assert done.returncode == 0, done.stderr
    for text in ("2 processes, by torchrun", "DP 2", "up to 3 jobs", "#SBATCH --signal=USR1@300"):
        assert text in done.stdout, text
    assert len(cluster.jobs()) == before and not (shared / "dry").exists()


def test_violations_of_recipe_megatron_and_slurm(cluster: Cluster, shared: Path) -> None:
    folder = ["--run-dir", str(shared / "bad")]
    layout = ["--expert-model-parallel-size", "3", "--time", "5"]
    done = call(cluster, "tiny-moe", *CPU, *folder, *layout, "--partition", "nope")
    assert done.returncode == 78 and "Traceback" not in done.stderr
    for text in ("does not divide the experts", "not longer than --grace", "Slurm: ", "partition"):
        assert text in done.stderr, text
    done = call(cluster, "tiny-moe", *SMALL_MOE, *CPU, *folder, "--moa-varaint", "qd")
    assert done.returncode == 78 and "--moa-varaint is no flag" in done.stderr
    assert "did you mean '--moa-variant'" in done.stderr
    for words in ((), ("--nodes", "2"), ("tiny-mo",), ("tiny-moe", "--nodes", "two")):
        assert call(cluster, *words).returncode == 78
    assert not (shared / "bad").exists()


def test_a_folder_in_use_is_refused(cluster: Cluster, shared: Path) -> None:
    held = ["--sbatch", "begin=now+1hour"]
    run = submit(cluster, shared / "held", "tiny-moe", *SMALL_MOE, *held, "--chain", "2")
    again = call(cluster, "tiny-moe", *SMALL_MOE, *CPU, "--no-check", "--run-dir", str(run.folder))
    assert again.returncode == 78 and f"in use by job {', '.join(run.jobs)}" in again.stderr
    cluster.cancel(*run.jobs)
    record = json.loads((run.folder / "submit.json").read_text())
    assert record["recipe"] == "tiny-moe" and len(record["revision"]) == 40
    assert record["command"].startswith("./launch/submit.py tiny-moe")


@pytest.mark.timeout(600)
def test_a_sweep_with_a_failing_point(cluster: Cluster, shared: Path) -> None:
    folder = shared / "sweep"
    words = [*SMALL_MOE, "--train-iters", "4", "--array-sweep", "lr=1e-3,2e-3,4e-3,oops"]
    run = submit(cluster, folder, "tiny-moe", *words)
    array, report = run.jobs
    states = [cluster.wait(f"{array}_{index}", 240)["JobState"] for index in range(4)]
    assert states == ["COMPLETED"] * 3 + ["FAILED"]
    assert cluster.job(f"{array}_3")["ExitCode"].startswith("78:")
    assert cluster.wait(report, 120)["JobState"] == "FAILED", "1: not every point has finished"
    table = (folder / "sweep.md").read_text()
    print(table)
    assert "lr=4e-3" in table and (folder / "sweep.png").stat().st_size > 5000
    log = (folder / "logs" / f"report-{report}.out").read_text()
    assert f"./launch/submit.py --rerun {folder}" in log
    losses = {
        point: json.loads((folder / point / "status.json").read_text())["loss"]
        for point in ("lr=1e-3", "lr=2e-3", "lr=4e-3")
    }
    assert len(set(losses.values())) == 3, "each point trained with its own learning rate"
    again = call(cluster, "--rerun", str(folder))
    assert again.returncode == 0 and "submitted 1 of 4 points" in again.stdout, again.stderr
    number = json.loads((folder / "chain.json").read_text())["jobs"][0]
    assert cluster.wait(f"{number}_3", 120)["JobState"] == "FAILED"
    assert len(list((folder / "logs").glob(f"slurm-{number}_*.out"))) == 1
    attempts = (folder / "lr=oops" / "attempts.jsonl").read_text()
    assert '"attempt": 2' in attempts and "'oops'" in run.log()


@pytest.mark.timeout(300)
def test_an_element_of_an_array_continues_by_requeue(cluster: Cluster, shared: Path) -> None:
    """It alone: the last element's job has the array's id, which would mean all of them."""
    folder = shared / "requeue"
    words = [*SMALL_MOE, "--train-iters", "60", "--array-sweep", "seed=1,2", "--chain", "2"]
    run = submit(cluster, folder, "tiny-moe", *words)
    element = folder / "seed=2"
    run.wait_for_file(element / "logs" / "attempt-001.log", "iteration +3/")
    cluster.cancel("--signal=USR1", f"{run.jobs[0]}_1")
    run.wait_for("requeueing this job: 2 of 2")
    for index in (0, 1):
        assert cluster.wait(f"{run.jobs[0]}_{index}", 120)["JobState"] == "COMPLETED"
    states = [json.loads((folder / name / "status.json").read_text()) for name in POINTS]
    assert [(s["state"], s["step"], s["attempt"]) for s in states] == [
        ("finished", 60, 1),
        ("finished", 60, 2),
    ]
