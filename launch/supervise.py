#!/usr/bin/env python3
"""Runs the attempts of one training run inside a Slurm job, and decides what follows each.

    launch/supervise.py -- srun ... launch/task.sh tiny-moe --run-dir runs/a

slurm.sbatch ends in this command; it works without Slurm too. After each attempt it reads what the
ranks have left in the run's folder: finished -> the rest of the chain is cancelled; stopped with a
checkpoint (75) -> the next job of the chain, or a requeue; failed -> another attempt in this
allocation; refused or storage -> nothing follows; no newer checkpoint in 3 attempts -> 93.
Standard library only, Python 3.9 or newer: it runs outside the container.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moa_megatron import attempts, runstate  # noqa: E402

_REQUEUE_WAIT = 120.0  # seconds that Slurm may take to end this job after a requeue


class Supervisor:
    """One job's share of a run: attempts, signals, and the jobs that follow."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.run_dir: Path = options.run_dir
        self.command: list[str] = options.command
        self.options = options
        self.history = attempts.History(self.run_dir)
        self.job = os.environ.get("SLURM_JOB_ID", "")
        self.chain = os.environ.get("MOA_CHAIN") or self.job or str(os.getpid())
        self.child: subprocess.Popen[str] | None = None
        self.terminated = self.cancelled = False

    def run(self) -> int:
        """Attempts until something is decided that another attempt would not change."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._receive)
        if (runstate.read_status(self.run_dir) or {}).get("state") == "finished":
            say(f"{self.run_dir} has finished already: nothing to do")
            self._cancel_rest("finished already")
            return runstate.FINISHED
        while True:
            attempt = self._attempt()
            decision = attempts.decide(
                attempt["code"], self.history.idle(self.chain), self.options.max_idle
            )
            self._report(attempt, decision)
            if self.terminated:
                return decision.code
            if decision.action == "retry" and self._time_left() > self.options.retry_needs:
                time.sleep(self.options.pause)
                continue
            if decision.action in ("hand_over", "retry"):
                return self._hand_over(decision)
            self._cancel_rest(decision.reason)
            return decision.code

    def _attempt(self) -> dict[str, Any]:
        number = len(self.history.read()) + 1
        notes = self.run_dir / "logs" / f"attempt-{number:03d}"
        notes.mkdir(parents=True, exist_ok=True)
        exit_file = notes / "exit"
        for stale in notes.glob("exit*"):
            stale.unlink()
        before = self._saved_step()
        started = time.time()
        nodes = os.environ.get("SLURM_JOB_NODELIST", "this host")
        say(f"attempt {number}, job {self.job or '-'}, {nodes}: {start_of(before)}")
        known = runstate.read_status(self.run_dir) or {}
        facts = {"attempt": number, "job": self.job, "checkpoints": known.get("checkpoints")}
        runstate.write_status(self.run_dir, "launching", None, **facts)
        casualties = attempts.Casualties(self.options.per_rank)
        returncode = self._launch(notes, exit_file, number, casualties)
        status = runstate.read_status(self.run_dir)
        code = attempts.outcome(status, exit_file, returncode)
        after = self._saved_step()
        failure = None
        if code not in (runstate.FINISHED, runstate.RETRY):
            failure = attempts.first_failure(runstate.read_failures(exit_file), casualties.found)
        record = {
            "attempt": number,
            "chain": self.chain,
            "job": self.job,
            "nodes": nodes,
            "started": started,
            "minutes": round((time.time() - started) / 60, 3),
            "code": code,
            "from_step": before,
            "to_step": after,
            "advanced": (after or 0) > (before or 0),
            "failure": failure,
            "log": str(notes.with_suffix(".log")),
        }
        self.history.append(record)
        return record

    def _launch(
        self, notes: Path, exit_file: Path, number: int, casualties: attempts.Casualties
    ) -> int:
        """Runs the command; its output goes to this job's output and to the attempt's log."""
        environment = dict(os.environ)
        if "MASTER_PORT" in environment:
            # The port of an attempt that has just died may still be taken.
            environment["MASTER_PORT"] = str(int(environment["MASTER_PORT"]) + number % 100)
        self.child = subprocess.Popen(
            [*self.command, "--exit-file", str(exit_file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert self.child.stdout is not None
        with notes.with_suffix(".log").open("a", encoding="utf-8", buffering=1) as log:
            for line in self.child.stdout:
                log.write(line)
                sys.stdout.write(line)
                sys.stdout.flush()
                casualties.read(line, time.time())
        returncode = self.child.wait()
        self.child = None
        return returncode

    def _report(self, attempt: dict[str, Any], decision: attempts.Decision) -> None:
        """The end of an attempt, on the output and in status.json."""
        number, minutes = attempt["attempt"], attempt["minutes"]
        say(f"attempt {number} after {minutes:.1f} min: {decision.reason}")
        facts: dict[str, Any] = {"attempt": number, "job": self.job, "decision": decision.reason}
        status = runstate.read_status(self.run_dir) or {}
        if attempt["code"] not in (runstate.FINISHED, runstate.RETRY):
            say(f"  first failure: {attempts.describe(attempt['failure'])}")
            say(f"  log:           {attempt['log']}")
            facts.update(attempt["failure"] or {})
            facts.pop("time", None)
            facts.pop("code", None)
        state = {runstate.FINISHED: "finished", runstate.RETRY: "stopped"}
        kept = {k: v for k, v in status.items() if k not in ("state", "exit_code", "time")}
        runstate.write_status(
            self.run_dir, state.get(decision.code, "failed"), decision.code, **{**kept, **facts}
        )

    def _hand_over(self, decision: attempts.Decision) -> int:
        if self.options.requeue:
            restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            if restarts + 1 < self.options.chain:
                say(f"requeueing this job: {restarts + 2} of at most {self.options.chain}")
                subprocess.run(["scontrol", "requeue", self.job], check=False)
                time.sleep(_REQUEUE_WAIT)  # Slurm ends this job meanwhile
            else:
                say(f"the chain of {self.options.chain} is used up: submit again to continue")
        elif self._rest():
            say(f"job {self._rest()[0]} continues")
        else:
            say("no job follows: submit again with the same --run-dir to continue")
        return decision.code

    def _rest(self) -> list[str]:
        """Jobs of the chain after this one."""
        try:
            jobs = json.loads((self.run_dir / "chain.json").read_text(encoding="utf-8"))["jobs"]
        except (OSError, ValueError, KeyError):
            return []
        return jobs[jobs.index(self.job) + 1 :] if self.job in jobs else []

    def _cancel_rest(self, reason: str) -> None:
        rest = self._rest()
        if rest:
            say(f"cancelling the rest of the chain ({', '.join(rest)}): {reason}")
            subprocess.run(["scancel", *rest], check=False)

    def _cancelled(self) -> bool:
        """Whether this job ends because someone cancelled it.

        Slurm says COMPLETING whatever the reason. A time limit leaves its name, a preemption its
        time, a requeue (also of a failed node) no end; a cancellation leaves none of them.
        """
        if not self.job:
            return False
        shown = subprocess.run(
            ["scontrol", "show", "job", "-o", self.job], capture_output=True, text=True, check=False
        )
        fields = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)
        return (
            fields.get("JobState") in ("CANCELLED", "COMPLETING")
            and fields.get("Reason") == "None"
            and fields.get("PreemptTime", "None") == "None"
            and fields.get("EndTime") != "Unknown"
        )

    def _saved_step(self) -> int | None:
        status = runstate.read_status(self.run_dir) or {}
        folder = Path(status.get("checkpoints") or self.run_dir / "checkpoints")
        try:
            return runstate.checkpoint_step(folder)
        except ValueError:
            return None

    def _time_left(self) -> float:
        """Seconds until the job's time limit; infinite without one."""
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        return float(end) - time.time() if end.isdigit() else float("inf")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGTERM and self.job:
            # Slurm signals all of the job's processes itself. Cancelling comes first: the jobs
            # that follow would start as soon as this one has ended.
            if not self.terminated and self._cancelled():
                self.cancelled = True
                self._cancel_rest("this job was cancelled")
            self.terminated = True
        elif self.job:
            name = signal.Signals(number).name[3:]
            subprocess.run(["scancel", "--signal", name, self.job], check=False)
        elif self.child is not None:
            self.terminated = number in (signal.SIGTERM, signal.SIGINT)
            self.child.send_signal(number)


def start_of(step: int | None) -> str:
    """Where an attempt starts, in words."""
    return "starts at step 0" if step is None else f"continues from step {step}"


def say(text: str) -> None:
    """A line of the supervisor's own, told apart from those of the ranks."""
    print(f"[supervise] {text}", flush=True)


def choose_point(options: argparse.Namespace) -> None:
    """In a sweep, one element of the array trains one point in a folder of its own."""
    sweep = json.loads((options.sweep / "sweep.json").read_text(encoding="utf-8"))
    index = int(os.environ["SLURM_ARRAY_TASK_ID"])
    point = next(point for point in sweep["points"] if point["index"] == index)
    options.run_dir = options.sweep / point["run_dir"]
    for key, value in point["settings"].items():
        options.command += ["--set", f"{key}={value}"]
    options.command += ["--run-dir", str(options.run_dir)]
    say(f"point {index}: {point['name']}")


def main() -> int:
    """Parses the options and supervises; returns the exit code of the exit contract."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", type=Path, help="folder of a sweep; an array element is a run")
    parser.add_argument("--per-rank", action="store_true", help="each task of srun is one rank")
    parser.add_argument("--requeue", action="store_true", help="continue by requeueing this job")
    parser.add_argument("--chain", type=int, default=1, help="how often the job may run in all")
    parser.add_argument("--max-idle", type=int, default=attempts.IDLE_LIMIT, help="then give up")
    parser.add_argument("--pause", type=float, default=10.0, help="seconds between attempts")
    parser.add_argument(
        "--retry-needs", type=float, default=300.0, help="seconds left for another attempt"
    )
    parser.add_argument("command", nargs="+", help="what starts the ranks, after --")
    options = parser.parse_args()
    if options.sweep is not None:
        choose_point(options)
    elif "--run-dir" in options.command:
        options.run_dir = Path(options.command[options.command.index("--run-dir") + 1])
    else:
        parser.error("the command must name its folder: --run-dir DIR, or give --sweep")
    options.run_dir.mkdir(parents=True, exist_ok=True)
    return Supervisor(options).run()


if __name__ == "__main__":
    sys.exit(main())
