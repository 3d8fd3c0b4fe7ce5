"""Attempts of a run: what each one came to, who failed first, and what the launcher does next.

Standard library only: it runs on a cluster's batch host, outside the container.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from moa_megatron import runstate

IDLE_LIMIT = 3
"""Attempts in a row without a newer checkpoint, after which a run is given up."""
_FINAL = {
    runstate.REFUSED: "configuration or input is refused",
    runstate.STORAGE: "storage failed; make room or repair it, then submit again",
    17: "Megatron found a computation that fails repeatedly; look at the hardware",
}
# What a rank says whose peer has gone: the consequence of a failure, not its cause.
CONSEQUENCES = re.compile(
    r"closed by peer|reset by peer|remote process exited|NCCL|[Tt]imed? ?out|Broken pipe"
    r"|Connection refused|DistBackendError|recvValue failed|Connection was likely closed"
)
_SRUN_TASK = re.compile(r"srun: error: (\S+): tasks? (\d+)[\d,-]*: (.+)")
_TORCHRUN = {
    "time": re.compile(r"^\s+time\s+: (\d{4}-\d\d-\d\d_\d\d:\d\d:\d\d)"),
    "host": re.compile(r"^\s+host\s+: (\S+)"),
    "rank": re.compile(r"^\s+rank\s+: (\d+) "),
    "exitcode": re.compile(r"^\s+exitcode\s+: (-?\d+) "),
}
_SIGNALS = {
    "Out Of Memory": 9,
    "Killed": 9,
    "Terminated": 15,
    "Segmentation fault": 11,
    "Aborted": 6,
    "Bus error": 7,
}
_TERMINATED = 15


@dataclass(frozen=True)
class Decision:
    """What the launcher does after an attempt, and the exit code that says so."""

    code: int
    action: str  # finish, hand_over, retry, stop
    reason: str


class History:
    """``attempts.jsonl`` of a run: a line when an attempt starts, another when it ends.

    The second is missing where the launcher itself was killed, with its node or by Slurm.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "attempts.jsonl"

    def read(self) -> list[dict[str, Any]]:
        """All attempts, oldest first, both lines as one; a half-written line is left out."""
        merged: dict[int, dict[str, Any]] = {}
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            merged.setdefault(record["attempt"], {}).update(record)
        attempts = list(merged.values())
        for attempt, following in zip(attempts, attempts[1:]):
            reached = attempt.setdefault("to_step", following["from_step"])
            attempt["advanced"] = (reached or 0) > (attempt["from_step"] or 0)
        return attempts

    def append(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def idle(self, chain: str, job: str | None = None) -> int:
        """Attempts of this chain, newest first, that left no newer checkpoint.

        A run that is submitted again after a repair starts a new chain, and counts anew.

        Args:
            chain: name of the submission.
            job: count those of this job only.
        """
        count = 0
        for attempt in reversed(self.read()):
            if attempt.get("chain") != chain or attempt.get("advanced"):
                break
            if job is not None and attempt.get("job") != job:
                break
            count += 1
        return count


def outcome(status: dict[str, Any] | None, exit_file: Path, returncode: int) -> int:
    """The exit code an attempt stands for.

    Args:
        status: ``status.json`` after it; ``None`` where there is none.
        exit_file: first code that a rank left, which torchrun and srun flatten to 1.
        returncode: of the launcher's command.
    """
    state = (status or {}).get("state")
    if state == "finished":
        return runstate.FINISHED
    if state == "stopped":
        return runstate.RETRY
    try:
        said = int(exit_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        said = 0
    # Finished or stopped would have a status: without one the ranks did not get that far.
    if said not in (runstate.FINISHED, runstate.RETRY):
        return said
    return returncode if 0 < returncode < 128 else runstate.FAILED


def decide(code: int, idle: int, limit: int = IDLE_LIMIT) -> Decision:
    """What follows from an attempt's code and the attempts without progress, it included."""
    if code == runstate.FINISHED:
        return Decision(code, "finish", "finished")
    if code in _FINAL:
        return Decision(code, "stop", _FINAL[code])
    if idle >= limit:
        reason = f"no newer checkpoint in {idle} attempts"
        return Decision(runstate.GAVE_UP, "stop", reason)
    if code == runstate.RETRY:
        return Decision(code, "hand_over", "stopped with a checkpoint")
    return Decision(code, "retry", f"failed with code {code}")


class Casualties:
    """Reads a launcher's output for ranks that died without a word of their own."""

    def __init__(self, per_rank: bool) -> None:
        self.per_rank = per_rank
        self.found: list[dict[str, Any]] = []
        self.storage = False
        self._block: dict[str, str] = {}

    def read(self, line: str, time: float) -> None:
        """Takes one line; ``time`` in seconds since the epoch."""
        self.storage = self.storage or runstate.says_storage(line)
        task = _SRUN_TASK.search(line)
        if task:
            signal = next((n for text, n in _SIGNALS.items() if task[3].startswith(text)), None)
            # Under torchrun a task is a node's launcher: which of its ranks died is not known.
            rank = int(task[2]) if self.per_rank else None
            if signal is not None:
                self._add(task[1], rank, signal, time)
        for key, pattern in _TORCHRUN.items():
            match = pattern.search(line)
            if match:
                self._block[key] = match[1]
        if len(self._block) == len(_TORCHRUN):
            block, self._block = self._block, {}
            if int(block["exitcode"]) < 0:
                at = datetime.strptime(block["time"], "%Y-%m-%d_%H:%M:%S").timestamp()
                self._add(block["host"], int(block["rank"]), -int(block["exitcode"]), at)

    def _add(self, host: str, rank: int | None, signal: int, time: float) -> None:
        known = [record["rank"] for record in self.found]
        if signal == _TERMINATED or rank in known:
            return  # terminated by the launcher, because of another one
        error = f"killed by signal {signal}" + (" (out of memory?)" if signal == 9 else "")
        self.found.append({"rank": rank, "host": host, "error": error, "time": time})


def first_failure(
    accounts: list[dict[str, Any]], casualties: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """The rank that failed first, as rank, host, step, error; None where nobody said anything.

    Args:
        accounts: what failing ranks wrote (``runstate.read_failures``).
        casualties: ranks that died without writing (``Casualties.found``).
    """
    causes = [a for a in accounts if not CONSEQUENCES.search(a["error"])]
    # A watchdog aborts (signal 6) ranks whose peers have gone.
    causes += [c for c in casualties if "signal 6" not in c["error"] and c["rank"] is not None]
    ranked = sorted(causes, key=lambda record: record["time"])
    ranked += [c for c in casualties if c not in causes]
    ranked += sorted(accounts, key=lambda record: record["time"])
    if not ranked:
        return None
    first = dict(ranked[0])
    if first.get("step") is None:
        first["step"] = max((a["step"] or 0 for a in accounts), default=None)
    return first


def describe(failure: dict[str, Any] | None) -> str:
    """One line: ``rank 3 on n2 at step 37: RuntimeError: ...``."""
    if failure is None:
        return "no rank left a message; see the log"
    step = f" at step {failure['step']}" if failure.get("step") is not None else ""
    message = (str(failure["error"]).strip().splitlines() or [""])[0]
    who = "a rank" if failure["rank"] is None else f"rank {failure['rank']}"
    return f"{who} on {failure['host']}{step}: {message}"
