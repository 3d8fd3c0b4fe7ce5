"""The Slurm of the tests behaves like one, as far as the launcher leans on it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers import slurm
from tests.helpers.slurm import NODES, Cluster, ClusterError

ROOT = Path(__file__).parents[2]


def output(record: dict[str, str]) -> str:
    file = Path(record["StdOut"])
    return file.read_text() if file.exists() else ""  # a job runs a moment before it has one


def test_what_is_missing_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.shutil, "which", lambda name, path: None)
    assert "apt-get install munge slurm-wlm" in str(slurm.missing())
    monkeypatch.setattr(slurm.shutil, "which", lambda name, path: name)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root, not uid 1000" in str(slurm.missing())


def test_both_nodes_are_there(cluster: Cluster) -> None:
    lines = cluster.run("sinfo", "--noheader", "--Node", "--format=%N %T %c").splitlines()
    assert [line.split()[0] for line in lines] == list(NODES)


def test_a_job_runs_on_both_nodes(cluster: Cluster, tmp_path: Path) -> None:
    words = "on=$SLURMD_NODENAME rank=$SLURM_PROCID gpus=$SLURM_GPUS_ON_NODE"
    script = f"srun --ntasks-per-node=1 bash -c 'echo {words}'"
    job = cluster.submit(
        script, "--nodes=2", "--gpus-per-node=2", folder=tmp_path, name="a name=with words"
    )
    record = cluster.wait(job)
    assert (record["JobState"], record["NumNodes"]) == ("COMPLETED", "2")
    assert record["JobName"] == "a name=with words"
    assert sorted(output(record).split("\n")[:2]) == ["on=n1 rank=0 gpus=2", "on=n2 rank=1 gpus=2"]
    assert job in {known["JobId"] for known in cluster.jobs()}


def test_the_next_starts_after_a_failure(cluster: Cluster, tmp_path: Path) -> None:
    first = cluster.submit("sleep 1; exit 75", folder=tmp_path, name="first")
    after = f"--dependency=afterany:{first}"
    second = cluster.submit("true", after, folder=tmp_path, name="second")
    assert cluster.job(second)["Reason"] in ("Dependency", "None")
    ended = cluster.wait(second, 20)
    failed = cluster.job(first)
    assert (ended["JobState"], failed["JobState"]) == ("COMPLETED", "FAILED")
    assert failed["ExitCode"] == "75:0" and failed["EndTime"] <= ended["StartTime"]


def test_elements_of_an_array_end_on_their_own(cluster: Cluster, tmp_path: Path) -> None:
    array = cluster.submit("exit $((SLURM_ARRAY_TASK_ID == 1))", "--array=0-2", folder=tmp_path)
    states = [cluster.wait(f"{array}_{index}", 20)["JobState"] for index in range(3)]
    assert states == ["COMPLETED", "FAILED", "COMPLETED"]


def test_a_cancelled_job_is_told_and_then_gone(cluster: Cluster, tmp_path: Path) -> None:
    marker = str(tmp_path / "step.sh")
    Path(marker).write_text("sleep 300\n")
    script = f"srun --ntasks-per-node=1 bash {marker} &\ntrap 'echo told' TERM; wait; wait"
    job = cluster.submit(script, "--nodes=2", folder=tmp_path)
    until(lambda: len(cluster.processes(marker)) >= len(NODES))
    cluster.cancel(job)
    record = cluster.wait(job, 40)
    assert record["JobState"] == "CANCELLED" and "told" in output(record)
    assert cluster.processes(marker) == []


def test_a_requeued_job_starts_again_within_seconds(cluster: Cluster, tmp_path: Path) -> None:
    script = 'echo try ${SLURM_RESTART_COUNT:-0}; [ "$SLURM_RESTART_COUNT" ] || sleep 300'
    options = ("--requeue", "--open-mode=append")
    job = cluster.submit(script, *options, folder=tmp_path)
    cluster.wait(job, 20, {"RUNNING"})
    until(lambda: "try 0" in output(cluster.job(job)))
    cluster.run("scontrol", "requeue", job)
    record = cluster.wait(job, 40)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1")
    assert "try 1" in output(record)


def test_what_did_not_come_is_reported_with_the_logs(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("echo last words; exit 3", folder=tmp_path)
    with pytest.raises(ClusterError, match=f"job {job} is FAILED") as caught:
        cluster.wait(job, 20, {"COMPLETED"})
    for part in ("last words", "ExitCode", "slurmctld.log", "n1.log", "n2.log"):
        assert part in str(caught.value)
    with pytest.raises(ClusterError, match=r"(?s)scontrol show job .*999.*Invalid job id"):
        cluster.job("999")


def test_what_a_test_leaves_in_the_queue_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """A failed test must not hold up the next ones, which would fail for want of nodes."""
    jobs = [cluster.submit("sleep 300", "--nodes=2", folder=tmp_path) for _ in range(2)]
    cluster.wait(jobs[0], 20, {"RUNNING"})
    cluster.clear()
    assert [cluster.job(job)["JobState"] for job in jobs] == ["CANCELLED", "CANCELLED"]


def test_killed_tests_leave_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\nfrom tests.helpers.slurm import Cluster\n"
        "cluster = Cluster()\ncluster.start()\nfolder = pathlib.Path(sys.argv[1])\n"
        "cluster.wait(cluster.submit('setsid sleep 300 & exec sleep 300', folder=folder), 20,"
        " {'RUNNING'})\nprint(cluster.folder, flush=True)\ntime.sleep(300)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    tests = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert tests.stdout is not None
    folder = Path(tests.stdout.readline().strip())
    keeper = psutil.Process(tests.pid).children()[0]
    owned = [keeper, *keeper.children(recursive=True)]
    assert len(owned) > 4 and (folder / "slurm.conf").is_file()
    os.kill(tests.pid, signal.SIGKILL)
    tests.wait()
    _, alive = psutil.wait_procs(owned, 20)
    assert not alive and not folder.exists()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)
