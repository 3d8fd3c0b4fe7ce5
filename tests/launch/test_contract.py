"""Stop and resume on a real Slurm: nothing is lost, nothing runs on, nothing loops."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from moa_megatron import runstate, telemetry
from tests.e2e.runs import Outcome, local
from tests.e2e.test_pretrain import tensors
from tests.helpers.slurm import Cluster
from tests.helpers.submitted import TWO_RANKS, Submitted, submit

pytestmark = pytest.mark.timeout(600)
# Long and many enough that no job of the chain can end before it is stopped: 0.2 s each on a fast
# and idle machine, and Slurm looks at time limits every 30 s.
STEPS = 260
LONG = ["--global-batch-size", "16"]
PAIR = [*TWO_RANKS, "--procs-per-node", "2"]
ENDLESS = [*TWO_RANKS, "--train-iters", "100000"]


@pytest.fixture(scope="module")
def uninterrupted(shared: Path) -> Outcome:
    done = local(shared / "whole", "tiny-moe", *TWO_RANKS, *LONG, *steps(STEPS), NPROC="2")
    assert done.code == 0
    return done


def steps(number: int) -> list[str]:
    return ["--train-iters", str(number), "--eval-interval", "20"]


def losses(folder: Path) -> telemetry.Curve:
    return telemetry.read_run(folder / "tensorboard", tested=True)[telemetry.TRAIN_LOSS]


def test_chain_of_three_ends_as_if_never_stopped(
    cluster: Cluster, shared: Path, uninterrupted: Outcome
) -> None:
    """Time limit near, then a signal, then the end: three jobs on two nodes, by torchrun."""
    words = [*TWO_RANKS, *LONG, *steps(STEPS), "--nodes", "2", "--chain", "3"]
    run = submit(cluster, shared / "chain", "tiny-moe", *words)
    assert len(run.jobs) == 3
    run.wait_for_step(3)
    # A minute from the start: within --grace, so Slurm signals at its next look, every 30 s.
    cluster.run("scontrol", "update", f"JobId={run.jobs[0]}", "TimeLimit=1")
    run.wait_for(r"\[supervise\] attempt 2, job \d+, n\[1-2\]: continues from step")
    run.wait_for_step(run.attempts[0]["to_step"] + 3)
    cluster.cancel("--signal=USR1", run.jobs[1])
    states = run.wait(timeout=240)
    print(run.log())
    assert states == ["FAILED", "FAILED", "COMPLETED"], "75 is no success, and no end"
    codes = [attempt["code"] for attempt in run.attempts]
    assert codes == [75, 75, 0]
    assert [a["from_step"] for a in run.attempts[1:]] == [a["to_step"] for a in run.attempts[:2]]
    assert run.status["step"] == STEPS and run.status["state"] == "finished"
    assert run.status["validation_loss"] == uninterrupted.status["validation_loss"]
    ours, theirs = losses(run.folder), losses(uninterrupted.folder)
    assert ours.steps == list(range(1, STEPS + 1)) and ours == theirs
    resumed = tensors(Outcome(0, "", run.folder))
    whole = tensors(uninterrupted)
    assert not [key for key in whole if not torch.equal(whole[key], resumed[key])]
    assert not run.orphans()


def test_finished_runs_cancel_their_successors(cluster: Cluster, shared: Path) -> None:
    run = submit(cluster, shared / "early", "tiny-moe", *PAIR, *steps(2), "--chain", "2")
    assert run.wait() == ["COMPLETED", "CANCELLED"]
    assert "cancelled the rest of the chain" in run.log()
    for name in ("job.sbatch", "submit.json", "recipe.yaml", "environment.txt", "attempts.jsonl"):
        assert (run.folder / name).stat().st_size, name


def test_cancel_means_cancel(cluster: Cluster, shared: Path) -> None:
    run = submit(cluster, shared / "cancel", "tiny-moe", *ENDLESS, "--nodes", "2", "--chain", "2")
    run.wait_for_step(3)
    cluster.cancel(run.jobs[0])
    assert run.wait() == ["CANCELLED", "CANCELLED"]
    assert not run.orphans()
    # Whether KillWait is long enough to save depends on the machine; what is saved is whole.
    saved = runstate.complete_steps(run.folder / "checkpoints")
    assert runstate.checkpoint_step(run.folder / "checkpoints") == (saved[-1] if saved else None)


@pytest.mark.parametrize(
    ("name", "model"),
    [("USR1", ()), ("TERM", ()), ("USR1", ("--per-rank",)), ("USR2", ("--per-rank",))],
)
def test_signals_reach_every_rank_and_leave_none(
    cluster: Cluster, shared: Path, name: str, model: tuple[str, ...]
) -> None:
    folder = shared / f"signal-{name}-{len(model)}"
    often = ["--save-interval", "3"]  # a save before the signal: its writers are signalled too
    run = submit(cluster, folder, "tiny-moe", *PAIR, *ENDLESS[-2:], *often, *model)
    run.wait_for(r"successfully saved checkpoint from iteration +3")
    cluster.cancel(f"--signal={name}", run.jobs[0])
    assert run.wait() == ["FAILED"]
    assert run.status["exit_code"] == 75 and run.status["signal"] == f"SIG{name}"
    assert run.attempts[0]["to_step"] == run.status["step"]
    assert "submit again with the same --run-dir" in run.log()
    assert not run.orphans()


@pytest.mark.parametrize("model", [(), ("--per-rank",)], ids=["torchrun", "per-rank"])
def test_killed_rank_is_named_and_the_run_goes_on(
    cluster: Cluster, shared: Path, model: tuple[str, ...]
) -> None:
    folder = shared / f"killed-{len(model)}"
    words = [*TWO_RANKS, *steps(60), "--save-interval", "20", "--procs-per-node", "2", *model]
    run = submit(cluster, folder, "tiny-moe", *words)
    run.wait_for_step(1)
    pids = ranks(run)  # takes seconds, in which a run may end: so before the save, not after it
    (other,) = {*pids} - {int(run.status["pid"])}
    run.wait_for(r"successfully saved checkpoint from iteration +20")
    os.kill(other, signal.SIGKILL)
    assert run.wait() == ["COMPLETED"]
    first, second = run.attempts
    print(first)
    assert (first["code"], second["code"]) == (1, 0)
    assert first["failure"]["rank"] == 1 and first["failure"]["step"] >= 20
    assert "killed by signal 9" in first["failure"]["error"] and first["failure"]["host"]
    assert re.search(r"first failure: rank 1 on \S+ at step \d+: killed by signal 9", run.log())
    assert second["from_step"] >= 20 and run.status["step"] == 60
    assert not run.orphans()


def ranks(run: Submitted) -> list[int]:
    """Process ids of the ranks: they run the trainer, torchrun names it only."""
    found = []
    for pid in run.orphans():
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        trains = "moa_megatron.pretrain" in words and "torch.distributed.run" not in words
        found += [(pid, parent)] if trains and "python" in words[0] else []
    pids = {pid for pid, _ in found}
    return [pid for pid, parent in found if parent not in pids]  # not their data loaders


def test_no_progress_gives_up(cluster: Cluster, shared: Path) -> None:
    folder = shared / "stuck"
    folder.mkdir()
    (folder / "tensorboard").write_text("a file where a folder must go")
    run = submit(cluster, folder, "tiny-moe", *PAIR, *steps(4), "--chain", "2")
    assert run.wait(timeout=300) == ["FAILED", "FAILED"]
    assert [attempt["code"] for attempt in run.attempts] == [1, 1, 1]
    assert [attempt["job"] for attempt in run.attempts] == [run.jobs[0]] * 2 + [run.jobs[1]], (
        "the third attempt may get better nodes"
    )
    assert cluster.job(run.jobs[1])["ExitCode"].startswith("93:")
    assert run.status["exit_code"] == 93
    assert "no newer checkpoint in 3 attempts" in run.log()
    assert run.status["rank"] == 1 and "File" in run.status["error"]


def test_refused_in_the_job_is_never_retried(cluster: Cluster, shared: Path) -> None:
    words = [*PAIR, *steps(4), "--no-such-flag", "1"]
    run = submit(cluster, shared / "refused", "tiny-moe", *words, "--chain", "2")
    started = time.monotonic()
    assert run.wait() == ["FAILED", "CANCELLED"] and time.monotonic() - started < 90
    assert [attempt["code"] for attempt in run.attempts] == [78]
    assert "--no-such-flag is no flag" in run.log()
