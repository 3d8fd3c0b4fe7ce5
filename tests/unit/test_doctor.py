"""tools/doctor.py as it is run, and its collectives with real ranks that hang, die and err."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT, environment
from tests.helpers.doctor import machine
from tests.helpers.slurm import marked_processes
from tools import doctor
from tools.doctor_checks import collectives
from tools.doctor_checks.collectives import Plan, Rank
from tools.doctor_checks.host import LEVELS, Finding, Host

TOOL = ROOT / "tools" / "doctor.py"
FIELDS = {"level", "check", "message", "cure", "value", "group"}


def run(*words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, str(TOOL), *words]
    env = environment()
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def test_everything_on_this_machine(tmp_path: Path) -> None:
    done = run("--json", "--run-dir", str(tmp_path), "--time-limit", "60")
    said = json.loads(done.stdout)
    assert (said["schema"], said["exit_code"]) == (1, done.returncode)
    levels = {}
    for finding in said["findings"]:
        assert set(finding) == FIELDS and finding["level"] in LEVELS, finding
        assert finding["level"] not in ("warning", "error") or finding["cure"], finding
        assert "check failed itself" not in finding["message"], finding
        levels[finding["check"]] = finding["level"]
    assert done.returncode == ("error" in levels.values())
    for name in (
        "python",
        "torch",
        "megatron-core",
        "patches",
        "write",
        "all-reduce",
        "all-to-all",
    ):
        assert levels[name] == "ok", said
    assert sum(said["counts"].values()) == len(said["findings"])


def test_without_torch_it_says_so_and_goes_on() -> None:
    done = run(options=("-I", "-S"))
    assert done.returncode == 1, done.stderr
    assert "ERROR  torch" in done.stdout and "./launch/setup.sh" in done.stdout
    assert "failed itself" not in done.stdout
    for group in ("limits", "storage", "network", "cluster", "project"):
        assert f"\n{group}\n" in done.stdout
    assert "left out: they need torch" in done.stdout


def test_help_shows_examples_and_no_colour_leaves_a_terminal() -> None:
    done = run("--help")
    assert done.returncode == 0 and "srun -N2" in done.stdout and "--recipe moe-2b" in done.stdout
    done = run("--quick", "--recipe", "moe-2b", "--tensor-model-parallel-size", "2")
    assert "not set; the launchers set 1 for moe-2b" in done.stdout
    assert "\x1b" not in done.stdout and "all-reduce" not in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nonsense"], "--nonsense: unknown"),
        (["--recipe", "nope"], "recipe 'nope' does not exist"),
        (["--recipe", "tiny-moe", "--set", "x"], "write it as key=value"),
        (["--time-limit", "0"], "not between 1 and 3600"),
        (["--multi-node"], "start it by srun"),
    ],
)
def test_bad_usage(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    with pytest.raises(SystemExit) as ended:
        doctor.main(words)
    assert ended.value.code == 78 and says in capsys.readouterr().err


def test_a_check_that_breaks_is_a_finding(tmp_path: Path) -> None:
    def broken(host: Host) -> None:
        raise KeyError("mig.mode")

    findings = list(doctor.examine(machine(tmp_path), {"GPUs": (broken,)}))  # type: ignore[dict-item]
    assert [(f.level, f.group, f.check) for f in findings] == [("warning", "GPUs", "broken")]


def test_a_check_that_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(host: Host) -> Iterator[Finding]:
        yield Finding("ok", "free disk", "plenty")
        threading.Event().wait()

    monkeypatch.setattr(doctor, "CHECK_LIMIT", 0.2)
    findings = list(doctor.examine(machine(tmp_path), {"storage": (stuck,)}))
    assert [(f.level, f.group, f.check) for f in findings][-1] == ("error", "storage", "stuck")
    assert "did not end within 0.2 s" in findings[-1].message


def smoke(fault: dict[int, dict[str, str]], limit: float) -> Finding:
    """What is found of two gloo ranks of which one is made to fail."""
    for seconds in (limit, 90.0):  # a busy machine imports torch for longer than the limit
        plan = Plan("gloo", 2, 2, port=collectives.free_port(), limit=seconds, faults=fault)
        finding = next(collectives.judge(plan, collectives.run(plan)))
        if "still imports" not in finding.message:
            break
    return finding


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCTOR_TEST", str(tmp_path))
    finding = smoke({1: {"stage": "all-gather", "kind": "hang"}}, 12)
    assert finding.level == "error"
    assert "rank 1 hangs before all-gather, while others wait in all-gather" in finding.message
    assert marked_processes(str(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind", "says"),
    [
        ("all-reduce", "die", "rank 1 failed in all-reduce: RuntimeError: made to fail"),
        ("all-to-all", "wrong", "rank 1 failed in all-to-all: all-to-all gives a wrong value"),
    ],
)
def test_a_rank_that_fails_is_named(stage: str, kind: str, says: str) -> None:
    finding = smoke({1: {"stage": stage, "kind": kind}}, 60)
    assert finding.level == "error" and says in finding.message and finding.cure


def test_a_killed_doctor_leaves_no_rank(tmp_path: Path) -> None:
    code = (
        "from tools.doctor_checks.collectives import Plan, run\n"
        "hang = {'stage': 'import', 'kind': 'hang'}\n"
        "run(Plan('gloo', 2, 2, limit=300, faults={0: hang, 1: hang}))"
    )
    env = environment(DOCTOR_TEST=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env)
    await_processes(tmp_path, 3)
    time.sleep(1)  # the ranks have asked for their signal
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    await_processes(tmp_path, 0)


def await_processes(marker: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(marked_processes(str(marker))) != count:
        assert time.monotonic() < deadline, f"not {count} processes"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("stages", "codes", "says", "level"),
    [
        (("import", "rendezvous"), (None, None), "rank 0 still imports torch", "warning"),
        (("rendezvous", "all-reduce"), (None, None), "rank 0 hangs in rendezvous", "error"),
        (("all-reduce", "all-reduce"), (None, None), "all ranks wait in all-reduce", "error"),
        (
            ("all-reduce", "all-reduce"),
            (0, -9),
            "rank 1 failed in all-reduce: killed by SIGKILL",
            "error",
        ),
        (("end", "start"), (0, 1), "rank 1 failed in start: exit code 1", "error"),
    ],
)
def test_who_is_to_blame(
    stages: tuple[str, ...], codes: tuple[int | None, ...], says: str, level: str
) -> None:
    ranks = [Rank(i, stage, True, code=code) for i, (stage, code) in enumerate(zip(stages, codes))]
    finding = next(collectives.judge(Plan("gloo", 2, 2), ranks))
    assert says in finding.message and finding.level == level and finding.cure


def test_the_cause_is_blamed_not_who_lost_its_peer() -> None:
    ranks = [
        Rank(0, "all-reduce", True, "RuntimeError: Connection closed by peer [10.0.0.2]:4", 1),
        Rank(1, "all-gather", True, "RuntimeError: CUDA error: an illegal memory access", 1),
    ]
    hosts = {0: "n1", 1: "n2"}
    finding = next(collectives.judge(Plan("nccl", 1, 2), ranks, hosts))
    assert "rank 1 on n2 failed in all-gather: RuntimeError: CUDA error" in finding.message
