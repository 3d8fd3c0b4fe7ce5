"""What an attempt came to, who failed first, what follows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from moa_megatron import attempts, runstate
from moa_megatron.attempts import Casualties, History, decide, first_failure, outcome


@pytest.mark.parametrize(
    ("status", "said", "returncode", "expected"),
    [
        ({"state": "finished"}, None, 0, 0),
        ({"state": "finished"}, None, 1, 0),  # a rank stumbled over the exit
        ({"state": "stopped"}, "75", 0, 75),
        ({"state": "launching"}, "78", 0, 78),
        ({"state": "failed"}, "74", 1, 74),
        ({"state": "running"}, None, 1, 1),  # killed: nobody wrote anything
        ({"state": "running"}, "0", 0, 1),  # a status is missing: never a success
        (None, None, 0, 1),
        ({"state": "running"}, "garbage", 137, 1),
        ({"state": "running"}, None, 16, 16),
    ],
)
def test_outcome(
    status: dict[str, Any] | None, said: str | None, returncode: int, expected: int, tmp_path: Path
) -> None:
    if said is not None:
        (tmp_path / "exit").write_text(said)
    assert outcome(status, tmp_path / "exit", returncode) == expected


@pytest.mark.parametrize(
    ("code", "idle", "action", "final"),
    [
        (0, 3, "finish", 0),
        (75, 0, "hand_over", 75),
        (75, 2, "hand_over", 75),
        (75, 3, "stop", 93),  # stopped again and again before the first step
        (1, 2, "retry", 1),
        (1, 3, "stop", 93),
        (16, 1, "retry", 16),
        (17, 0, "stop", 17),
        (74, 0, "stop", 74),
        (78, 0, "stop", 78),
    ],
)
def test_decision(code: int, idle: int, action: str, final: int) -> None:
    decision = decide(code, idle)
    assert (decision.action, decision.code) == (action, final) and decision.reason


def test_history_counts_attempts_without_progress_of_this_chain(tmp_path: Path) -> None:
    history = History(tmp_path)
    assert history.read() == [] and history.idle("b") == 0
    steps = (("a", 0, 0), ("b", 0, 0), ("b", 0, 5), ("b", 5, 5), ("b", 5, 5))
    for number, (chain, start, end) in enumerate(steps):
        common = {"attempt": number, "chain": chain, "from_step": start}
        history.append({**common, "to_step": end, "advanced": end > start})
    assert history.idle("b") == 2
    assert history.idle("c") == 0, "a run that is submitted again counts anew"
    with history.path.open("a") as file:
        file.write('{"chain": "b", "adv')
    assert len(history.read()) == 5


def test_attempts_whose_launcher_was_killed_count_too(tmp_path: Path) -> None:
    history = History(tmp_path)
    for number, start in enumerate((None, None, 5, 5, 5)):
        history.append({"attempt": number, "chain": "a", "from_step": start})
    assert [a.get("advanced") for a in history.read()] == [False, True, False, False, None]
    assert history.idle("a") == 3


SRUN = "srun: error: n2: task 3: Killed"
TORCHRUN = """\
  time      : 2026-11-22_14:30:20
  host      : n2.example
  rank      : 3 (local_rank: 1)
  exitcode  : -9 (pid: 2412)
  error_file: <N/A>
"""


def account(rank: int, error: str, at: float, step: int | None = 7) -> dict[str, Any]:
    return {"rank": rank, "host": f"h{rank}", "step": step, "error": error, "time": at, "code": 1}


def test_casualties_of_srun_and_torchrun() -> None:
    tasks = Casualties(per_rank=True)
    for at, line in enumerate((SRUN, "srun: error: n1: task 0: Terminated", SRUN)):
        tasks.read(line, float(at))
    assert [(c["rank"], c["host"], c["time"]) for c in tasks.found] == [(3, "n2", 0.0)]
    agents = Casualties(per_rank=False)
    for line in [SRUN, *TORCHRUN.splitlines()]:
        agents.read(line, 5.0)
    assert [(c["rank"], c["host"]) for c in agents.found] == [(None, "n2"), (3, "n2.example")]
    assert all("out of memory" in found["error"] for found in agents.found)
    first = first_failure([], agents.found)
    assert first is not None and first["rank"] == 3, "a rank says more than a node's launcher"
    assert time.localtime(first["time"])[:6] == (2026, 11, 22, 14, 30, 20)
    full = Casualties(per_rank=False)
    full.read("OSError: [Errno 28] No space left on device", 1.0)
    assert full.storage and not agents.storage


def test_kinds_of_srun_messages_and_late_aborts() -> None:
    ranks = Casualties(per_rank=True)
    for line in (
        "srun: error: n1: tasks 8-15: Aborted",
        "srun: error: n2: task 3: Out Of Memory",
        "srun: error: n3: tasks 4,5: Segmentation fault",
    ):
        ranks.read(line, 1.0)
    assert [c["rank"] for c in ranks.found] == [8, 3, 4]
    first = first_failure([], ranks.found)
    assert first is not None and first["rank"] == 3, "a watchdog's abort is a consequence"
    failed = Casualties(per_rank=False)
    for line in TORCHRUN.replace("-9", "1").splitlines():
        failed.read(line, 5.0)
    assert not failed.found, "it has left an account of its own"


def test_the_cause_comes_before_its_consequences() -> None:
    peers = [
        account(0, "RuntimeError: Connection closed by peer", 1.0),
        account(2, "DistBackendError: NCCL error", 1.1, step=9),
    ]
    killed = [{"rank": 3, "host": "n2", "error": "killed by signal 9", "time": 4.0}]
    first = first_failure(peers, killed)
    assert first is not None and first["rank"] == 3 and first["step"] == 9
    cause = account(1, "ValueError: loss is nan", 2.0)
    first = first_failure([*peers, cause], [])
    assert first is not None and first["rank"] == 1
    first = first_failure(peers, [])
    assert first is not None and first["rank"] == 0, "without a cause the earliest speaks"
    assert first_failure([], []) is None
    assert attempts.describe(cause) == "rank 1 on h1 at step 7: ValueError: loss is nan"
    assert "no rank left a message" in attempts.describe(None)


def test_accounts_of_ranks_are_what_first_failure_takes(tmp_path: Path) -> None:
    runstate.write_failure(tmp_path / "exit", 5, 74, "OSError: No space left on device", 12)
    first = first_failure(runstate.read_failures(tmp_path / "exit"), [])
    assert first is not None and abs(first["time"] - time.time()) < 60
    assert json.dumps(first) and attempts.describe(first).endswith("No space left on device")
