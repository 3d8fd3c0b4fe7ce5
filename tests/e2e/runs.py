"""Starts the real entry point as a user does, in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Small enough that a run is little more than Megatron's start-up.
SMALL = [
    *("--mock-data", "--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "24"),
    *("--seq-length", "32", "--global-batch-size", "4", "--micro-batch-size", "2"),
    *("--train-iters", "6", "--eval-interval", "3", "--eval-iters", "1", "--log-interval", "1"),
    *("--tensorboard-log-interval", "1", "--save-interval", "3"),
]
SMALL_MAE = [
    *("--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "24"),
    *("--num-attention-heads", "2", "--mae-decoder-layers", "1", "--mae-decoder-width", "16"),
    *("--mae-decoder-heads", "2", "--mae-decoder-ffn", "16", "--mae-pictures", "3"),
    *("--global-batch-size", "16", "--micro-batch-size", "4", "--eval-iters", "2"),
    *("--train-iters", "6", "--eval-interval", "3", "--save-interval", "3"),
    *("--lr-warmup-iters", "1", "--log-interval", "1", "--tensorboard-log-interval", "1"),
    *("--moa-log-interval", "3"),
]
SMALL_MOE = [*SMALL, "--moe-ffn-hidden-size", "12", "--moe-shared-expert-intermediate-size", "20"]


@dataclass(frozen=True)
class Outcome:
    code: int
    output: str
    folder: Path

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.folder / "status.json").read_text())  # type: ignore[no-any-return]


def environment(**extra: str) -> dict[str, str]:
    fixed = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **fixed, **extra}


def pretrain(folder: Path, *words: str) -> Outcome:
    """`python -m moa_megatron.pretrain` in one process."""
    command = [sys.executable, "-m", "moa_megatron.pretrain", *words, "--run-dir", str(folder)]
    return _run(command, folder, environment())


def local(folder: Path, *words: str, stop_after: str | None = None, **extra: str) -> Outcome:
    """`./launch/local.sh`, the command of the README; SIGTERM once `stop_after` is printed."""
    command = [str(ROOT / "launch" / "local.sh"), *words, "--run-dir", str(folder)]
    return _run(command, folder, environment(**extra), stop_after)


def _run(
    command: list[str], folder: Path, env: dict[str, str], stop_after: str | None = None
) -> Outcome:
    process = subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if stop_after is not None and stop_after in line:
            process.terminate()
            stop_after = None
    output = "".join(lines)
    print(output)
    return Outcome(process.wait(), output, folder)
