"""launch/supervise.py without Slurm, around commands that leave what a run leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moa_megatron.attempts import History

ROOT = Path(__file__).parents[2]
FINISH = 'echo \'{"state": "finished"}\' >"$run/status.json"'
SAVE = (
    'mkdir -p "$run/checkpoints"; echo $(($(cat "$tracker" 2>/dev/null || echo 0) + 5)) >"$tracker"'
)


def supervise(
    folder: Path, script: str, *options: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """Runs a shell script as the run; it sees $run, $tracker, $count and $exit_file."""
    done = subprocess.run(
        command(folder, script, *options),
        env={**os.environ, "SLURM_JOB_ID": "", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    print(done.stdout, done.stderr)
    return done, History(folder).read()


def command(folder: Path, script: str, *options: str) -> list[str]:
    preamble = (
        'run=$2 exit_file=$4 tracker="$2/checkpoints/latest_checkpointed_iteration.txt"; '
        'echo x >>"$run/count"; count=$(wc -l <"$run/count"); '
    )
    words = [sys.executable, str(ROOT / "launch" / "supervise.py"), "--pause", "0.1", *options]
    return [*words, "--", "bash", "-c", preamble + script, "bash", "--run-dir", str(folder)]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())  # type: ignore[no-any-return]


def test_failures_are_retried_until_the_run_has_finished(tmp_path: Path) -> None:
    fails = f'{SAVE}; [ "$count" -ge 5 ] || exit 1; {FINISH}'
    done, attempts = supervise(tmp_path, fails)
    assert done.returncode == 0 and [a["code"] for a in attempts] == [1, 1, 1, 1, 0]
    assert [a["to_step"] for a in attempts] == [5, 10, 15, 20, 25]
    assert all(a["advanced"] for a in attempts), "any number of attempts that get ahead"
    again, attempts = supervise(tmp_path, "exit 1")
    assert again.returncode == 0 and len(attempts) == 5 and "nothing to do" in again.stdout


def test_three_attempts_without_progress_are_the_last(tmp_path: Path) -> None:
    done, attempts = supervise(tmp_path, "echo of no use; exit 1")
    assert done.returncode == 93 and len(attempts) == 3
    assert status(tmp_path)["exit_code"] == 93 and status(tmp_path)["state"] == "failed"
    assert "of no use" in (tmp_path / "logs" / "attempt-003.log").read_text()
    done, attempts = supervise(tmp_path, FINISH)
    assert done.returncode == 0 and len(attempts) == 4, "submitted again, it counts anew"


def test_refusals_and_full_disks_are_not_retried(tmp_path: Path) -> None:
    for code in (78, 74, 17):
        folder = tmp_path / str(code)
        done, attempts = supervise(folder, f'echo {code} >"$exit_file"')
        assert done.returncode == code and len(attempts) == 1
        assert status(folder)["exit_code"] == code


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root: a small file system is mounted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_ends_the_run(small_disk: Path) -> None:
    script = 'head -c 1M /dev/zero >"$run/fill"; echo 1 >"$exit_file"; exit 1'
    done = subprocess.run(
        command(small_disk / "run", script),
        env={**os.environ, "SLURM_JOB_ID": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 74, "once, not three times and 93"
    assert "No space left on device" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_first_failing_rank_reaches_status_and_output(tmp_path: Path) -> None:
    record = {"rank": 2, "host": "n7", "step": 4, "error": "ValueError: x", "time": 1.0, "code": 1}
    script = f'echo 1 >"$exit_file"; echo \'{json.dumps(record)}\' >"$exit_file.rank2"; exit 1'
    done, attempts = supervise(tmp_path, script, "--max-idle", "1")
    assert done.returncode == 93 and attempts[0]["failure"]["host"] == "n7"
    assert "first failure: rank 2 on n7 at step 4: ValueError: x" in done.stdout
    assert (status(tmp_path)["rank"], status(tmp_path)["host"]) == (2, "n7")


def test_no_time_left_hands_over(tmp_path: Path) -> None:
    scontrol = tmp_path / "bin" / "scontrol"  # stands in for Slurm's, which says this much
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\necho JobState=RUNNING EndTime=2020-01-01T00:00:00\n")
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}:{os.environ['PATH']}"
    done, attempts = supervise(tmp_path, "exit 1", SLURM_JOB_ID="9", PATH=path)
    assert done.returncode == 1 and len(attempts) == 1
    assert "submit again with the same --run-dir" in done.stdout


def test_signals_go_to_the_run(tmp_path: Path) -> None:
    stops = 'trap \'echo "{\\"state\\": \\"stopped\\"}" >"$run/status.json"; exit 0\' USR1; '
    words = command(tmp_path, stops + "echo ready; while :; do sleep 0.1; done")
    environment = {**os.environ, "SLURM_JOB_ID": ""}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "ready" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGUSR1)
    output = process.stdout.read()
    assert process.wait(30) == 75 and "stopped with a checkpoint" in output


def test_ports_differ_between_attempts(tmp_path: Path) -> None:
    supervise(tmp_path, 'echo "$MASTER_PORT" >>"$run/ports"; exit 1', MASTER_PORT="23456")
    ports = (tmp_path / "ports").read_text().split()
    assert len(set(ports)) == 3 and all(int(port) > 23456 for port in ports)


def test_a_point_of_a_sweep_is_a_run_of_its_own(tmp_path: Path) -> None:
    points = [
        {"index": 0, "name": "lr=1", "settings": {"lr": "1"}, "run_dir": "lr=1"},
        {"index": 1, "name": "lr=2", "settings": {"lr": "2"}, "run_dir": "lr=2"},
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"points": points}))
    script = 'echo "$@" >"$4/words"; ' + FINISH.replace("$run", "$4")
    words = command(tmp_path, "", "--sweep", str(tmp_path))[: -len(["x"] * 4)]
    words = [*words[: words.index("--")], "--", "bash", "-c", script, "bash"]
    done = subprocess.run(
        words,
        env={**os.environ, "SLURM_JOB_ID": "", "SLURM_ARRAY_TASK_ID": "1"},
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr)
    folder = tmp_path / "lr=2"
    assert done.returncode == 0 and (folder / "attempts.jsonl").is_file()
    assert not (tmp_path / "lr=1").exists()
