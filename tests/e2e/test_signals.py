"""Signals at every moment of a run: acted on at the next safe point, nothing torn, none left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from moa_megatron import runstate, telemetry
from tests.e2e.runs import ROOT, SMALL_MOE, Outcome, environment, pretrain
from tests.helpers.slurm import marked_processes

PAIR = [*SMALL_MOE, "--expert-model-parallel-size", "2"]


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [str(ROOT / "launch" / "local.sh"), "tiny-moe", *words, "--run-dir", str(folder)]
    return subprocess.Popen(
        command,
        env=environment(NPROC="2", MOA_LOGS=str(folder)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def after(process: subprocess.Popen[str], text: str, act: Callable[[], object]) -> str:
    """Reads the output to its end, acts when a text appears; returns the whole output."""
    assert process.stdout is not None
    lines, acted = [], False
    for line in process.stdout:
        lines.append(line)
        if text in line and not acted:
            acted = True
            act()
    print("".join(lines))
    assert acted, f"{text!r} never appeared"
    return "".join(lines)


def alive(folder: Path) -> list[int]:
    """Processes of a run two seconds after its end, which those that a rank spawned may take."""
    time.sleep(2)
    return marked_processes(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "moment", "words"),
    [
        ("SIGUSR1", "moa-megatron: tiny-moe", ()),  # model and data are not there yet
        ("SIGTERM", "saving checkpoint at iteration       3", ()),
        ("SIGUSR2", "iteration        3/", ("--eval-interval", "3", "--eval-iters", "5000")),
    ],
    ids=["set-up", "save", "evaluation"],
)
def test_signal(name: str, moment: str, words: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, *PAIR, "--train-iters", "4000", *words)
    number = getattr(signal, name)
    after(process, moment, lambda: process.send_signal(number))
    assert process.wait() == 75 and not alive(folder)
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["signal"]) == ("stopped", name)
    steps = runstate.complete_steps(folder / "checkpoints")
    assert steps[-1] == status["step"] == runstate.checkpoint_step(folder / "checkpoints")
    if words:
        assert status["step"] == 3, "the evaluation was cut short, not waited for"


@pytest.mark.slow
def test_an_evaluation_cut_short_does_not_shift_the_next(tmp_path: Path) -> None:
    words = [*SMALL_MOE, "--eval-interval", "3", "--eval-iters", "40", "--train-iters", "6"]
    whole = pretrain(tmp_path / "whole", "tiny-moe", *words)
    assert whole.code == 0
    folder = tmp_path / "cut"
    command = ["-m", "moa_megatron.pretrain", "tiny-moe", *words, "--run-dir", str(folder)]
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    after(process, "iteration        3/", lambda: process.send_signal(signal.SIGUSR2))
    assert process.wait() == 75
    resumed = pretrain(folder, "tiny-moe", *words)
    assert resumed.code == 0 and resumed.status["step"] == 6

    def curves(run: Outcome) -> dict[str, telemetry.Curve]:
        return telemetry.read_run(run.folder / "tensorboard", tested=True)

    ours, theirs = curves(resumed), curves(whole)
    assert ours[telemetry.TRAIN_LOSS] == theirs[telemetry.TRAIN_LOSS]
    assert 3 not in ours[telemetry.VALID_LOSS].steps, "it was cut short"
    assert ours[telemetry.VALID_LOSS].values[-1] == theirs[telemetry.VALID_LOSS].values[-1]


@pytest.mark.slow
def test_signals_to_every_process_do_not_tear_a_later_save(tmp_path: Path) -> None:
    """Slurm signals all processes of a step: those that write checkpoints, load data, wait."""
    folder = tmp_path / "run"
    process = start(folder, *PAIR, "--train-iters", "4000")

    def everyone() -> None:
        for pid in marked_processes(str(folder)):
            os.kill(pid, signal.SIGUSR1)

    after(process, "iteration        4/", everyone)  # the step after a save
    assert process.wait() == 75 and not alive(folder)
    assert runstate.complete_steps(folder / "checkpoints")[-1] > 3


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_rank(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, *PAIR, "--train-iters", "4000")

    def kill() -> None:
        for child in psutil.Process(process.pid).children(recursive=True):
            if "torch.distributed.run" in " ".join(child.cmdline()):
                child.kill()
                return

    after(process, "iteration        2/", kill)
    assert process.wait() not in (0, 75)
    assert not alive(folder)


def test_tensorboard_serves_a_run_and_refuses_what_is_none(tmp_path: Path) -> None:
    script = str(ROOT / "launch" / "tensorboard.sh")
    refused = subprocess.run([script, str(tmp_path)], capture_output=True, text=True)
    assert refused.returncode == 78 and "holds no TensorBoard events" in refused.stderr
    (tmp_path / "events.out.tfevents.1.x").touch()
    port = "16006"
    server = subprocess.Popen(
        [script, str(tmp_path), "--port", port],
        env=environment(SSH_CONNECTION="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdout is not None
        lines = []
        for line in server.stdout:
            lines.append(line)
            if "Press CTRL+C" in line:
                break
        assert f"ssh -N -L {port}:localhost:{port}" in "".join(lines), lines
        with urllib.request.urlopen(f"http://localhost:{port}/", timeout=20) as answer:
            assert answer.status == 200
    finally:
        server.terminate()
        server.wait(20)
