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
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moa_megatron import attempts, runstate, slurm, sweeps  # noqa: E402

_REQUEUE_WAIT = 120.0  # seconds that Slurm may take to end this job after a requeue
_IDLE_HERE = 2  # attempts without progress in one allocation, where another one follows


class Supervisor:
    """One job's share of a run: attempts, signals, and the jobs that follow."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.run_dir: Path = options.run_dir
        self.command: list[str] = options.command
        self.options = options
        self.history = attempts.History(self.run_dir)
        self.job = os.environ.get("SLURM_JOB_ID", "")
        self.target = slurm.own_job()
        chain, self.jobs = slurm.noted_jobs(self.run_dir)
        in_chain = self.job in self.jobs
        self.chain = chain if in_chain else self.target or str(os.getpid())
        self.rest = self.jobs[self.jobs.index(self.job) + 1 :] if in_chain else []
        self.child: subprocess.Popen[str] | None = None
        self.terminated = False

    def run(self) -> int:
        """Attempts until something is decided that another attempt would not change."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._receive)
        if (runstate.read_status(self.run_dir) or {}).get("state") == "finished":
            say(f"{self.run_dir} has finished already: nothing to do")
            self.cancel_rest("finished already")
            return runstate.FINISHED
        while True:
            attempt = self._attempt()
            decision = attempts.decide(
                attempt["code"], self.history.idle(self.chain), self.options.max_idle
            )
            self._report(attempt, decision)
            if self.terminated and not self._out_of_time():
                return decision.code
            if decision.action == "retry" and self._may_retry():
                time.sleep(self.options.pause)
                continue
            if decision.action in ("hand_over", "retry"):
                return self._hand_over(attempt, decision)
            self.cancel_rest(decision.reason)
            return decision.code

    def _may_retry(self) -> bool:
        """Whether another attempt makes sense in this allocation.

        Not where it could not save before the time limit, and not a third time without progress
        where the next job may get better nodes.
        """
        here = self.history.idle(self.chain, self.target)
        if self.terminated or (here >= _IDLE_HERE and self.rest):
            return False
        return slurm.seconds_left(slurm.fields(self.target)) > self.options.retry_needs

    def _out_of_time(self) -> bool:
        """Whether Slurm has ended this job for its time limit, not at someone's wish."""
        return bool(self.options.requeue) and slurm.fields(self.target).get("Reason") == "TimeLimit"

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
        start = "starts at step 0" if before is None else f"continues from step {before}"
        say(f"attempt {number}, job {self.target or '-'}, {nodes}: {start}")
        record: dict[str, Any] = {
            "attempt": number,
            "chain": self.chain,
            "job": self.target,
            "nodes": nodes,
            "started": started,
            "from_step": before,
            "log": str(notes.with_suffix(".log")),
        }
        self.history.append(record)
        known = runstate.read_status(self.run_dir) or {}
        facts = {"attempt": number, "job": self.job, "checkpoints": known.get("checkpoints")}
        runstate.write_status(self.run_dir, "launching", None, **facts)
        casualties = attempts.Casualties(self.options.per_rank)
        returncode = self._launch(notes, exit_file, number, casualties)
        status = runstate.read_status(self.run_dir)
        code = attempts.outcome(status, exit_file, returncode)
        if code == runstate.FAILED and casualties.storage:
            code = runstate.STORAGE  # the rank had no room to say so in its file
        after = self._saved_step()
        failure = None
        if code not in (runstate.FINISHED, runstate.RETRY):
            failure = attempts.first_failure(runstate.read_failures(exit_file), casualties.found)
        record.update(
            minutes=round((time.time() - started) / 60, 3),
            code=code,
            to_step=after,
            advanced=(after or 0) > (before or 0),
            failure=failure,
        )
        self.history.append(record)
        return record

    def _launch(
        self, notes: Path, exit_file: Path, number: int, casualties: attempts.Casualties
    ) -> int:
        """Runs the command; its output goes to this job's output and to the attempt's log."""
        environment = {**os.environ, "MOA_LOGS": str(notes)}
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
                # On a full disk the pipe must still be drained, or the ranks would block.
                with contextlib.suppress(OSError):
                    log.write(line)
                with contextlib.suppress(OSError):
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

    def _hand_over(self, attempt: dict[str, Any], decision: attempts.Decision) -> int:
        """Lets the next job, or this one once more, continue."""
        job = slurm.fields(self.target)
        used = sum(bool(a.get("requeued")) for a in self.history.read() if a["chain"] == self.chain)
        # Before 24.05 Slurm does not requeue a preempted job that ended by itself in its grace.
        preempted = slurm.is_preempted(job) and job.get("Requeue") == "1" and not self.rest
        if self.rest:
            say(f"job {self.rest[0]} continues")
        elif preempted or (self.options.requeue and used + 1 < self.options.chain):
            if not preempted:
                self.history.append({"attempt": attempt["attempt"], "requeued": True})
            self._requeue("preempted" if preempted else f"{used + 2} of {self.options.chain}")
        elif self.options.requeue:
            say(f"the chain of {self.options.chain} is used up: submit again to continue")
        else:
            say("no job follows: submit again with the same --run-dir to continue")
        return decision.code

    def _requeue(self, why: str) -> None:
        say(f"requeueing this job: {why}")
        done = subprocess.run(
            ["scontrol", "requeue", self.target], capture_output=True, text=True, check=False
        )
        if done.returncode:
            say(f"Slurm refuses ({done.stderr.strip()}): submit again to continue")
        else:
            time.sleep(_REQUEUE_WAIT)  # Slurm ends this job meanwhile

    def cancel_rest(self, reason: str) -> None:
        """Cancels the jobs of the chain behind this one."""
        if self.rest:
            slurm.cancel(self.rest)
            say(f"cancelled the rest of the chain ({', '.join(self.rest)}): {reason}")

    def _saved_step(self) -> int | None:
        status = runstate.read_status(self.run_dir) or {}
        folder = Path(status.get("checkpoints") or self.run_dir / "checkpoints")
        try:
            found = runstate.checkpoint_step(folder)
        except ValueError:
            found = None
        # A container may know the folder by another name than this host.
        said = Path(status.get("checkpoint") or "").name.removeprefix("iter_")
        return int(said) if found is None and said.isdigit() else found

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGTERM and self.job:
            # Slurm signals all of the job's processes itself. Cancelling comes first: the jobs
            # that follow would start as soon as this one has ended.
            if not self.terminated and slurm.is_cancelled(slurm.fields(self.target)):
                self.cancel_rest("this job was cancelled")
            self.terminated = True
        elif self.job:
            name = signal.Signals(number).name[3:]
            subprocess.run(["scancel", "--signal", name, self.target], check=False)
        elif self.child is not None:
            self.terminated = number in (signal.SIGTERM, signal.SIGINT)
            self.child.send_signal(number)


def say(text: str) -> None:
    """A line of the supervisor's own, told apart from those of the ranks."""
    print(f"[supervise] {text}", flush=True)


def run_dir_of(command: list[str]) -> Path | None:
    """The folder that a command's ``--run-dir`` names."""
    for word, following in zip(command, [*command[1:], ""]):
        if word == "--run-dir" or word.startswith("--run-dir="):
            return Path(word.partition("=")[2] or following)
    return None


def choose_point(options: argparse.Namespace) -> None:
    """In a sweep, one element of the array trains one point in a folder of its own."""
    point = sweeps.read_point(options.sweep, int(os.environ["SLURM_ARRAY_TASK_ID"]))
    options.run_dir = options.sweep / point["run_dir"]
    for key, value in point["settings"].items():
        options.command += ["--set", f"{key}={value}"]
    options.command += ["--run-dir", str(options.run_dir)]
    say(f"point {point['index']}: {point['name']}")


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
        "--retry-needs", type=float, default=420.0, help="seconds left for another attempt"
    )
    parser.add_argument("command", nargs="+", help="what starts the ranks, after --")
    options = parser.parse_args()
    if options.sweep is not None:
        choose_point(options)
    else:
        options.run_dir = run_dir_of(options.command)
    if options.run_dir is None:
        parser.error("the command must name its folder: --run-dir DIR, or give --sweep")
    supervisor = None
    try:
        options.run_dir.mkdir(parents=True, exist_ok=True)
        supervisor = Supervisor(options)
        return supervisor.run()
    except OSError as error:
        if not runstate.is_storage_error(error):
            raise
        if supervisor is not None:
            supervisor.cancel_rest("storage failed")
        sys.stderr.write(f"storage: {error}\n")
        return runstate.STORAGE


if __name__ == "__main__":
    sys.exit(main())
