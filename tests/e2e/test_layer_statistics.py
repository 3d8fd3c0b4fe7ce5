"""A run logs what its layers do, and the tool shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moa_megatron import telemetry
from tests.e2e.runs import ROOT, SMALL_MOE, Outcome, environment, local, pretrain

EVERY = [*SMALL_MOE, "--moa-log-interval", "2"]


def check(done: Outcome) -> None:
    assert done.code == 0
    curves = telemetry.read_statistics(done.folder / "tensorboard")
    # Three values of all layers; of each its gates, and the ranges of shared and routed experts.
    assert len(curves) == 3 + 2 * (14 + 2 + 4)
    assert {tuple(curve.steps) for curve in curves.values()} == {(2, 4, 6)}
    for layer in ("layer_01", "layer_02"):
        gate = curves[f"moa/{layer}/gate_mean/z_silu"].values
        assert all(0.3 < value < 0.7 for value in gate) and len(set(gate)) == 3
        assert min(curves[f"moa/{layer}/routed/hidden_amax"].values) > 0
    command = [sys.executable, str(ROOT / "tools" / "view_gates.py"), str(done.folder)]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert shown.returncode == 0, shown.stderr
    assert "| layer_02/shared |" in shown.stdout
    assert (done.folder / "gates.png").stat().st_size > 20_000


def test_statistics_are_logged_and_drawn(tmp_path: Path) -> None:
    check(pretrain(tmp_path / "run", "tiny-moe", *EVERY))


@pytest.mark.slow
def test_statistics_of_other_stages_reach_the_rank_that_writes(tmp_path: Path) -> None:
    words = [*EVERY, "--pipeline-model-parallel-size", "2"]
    check(local(tmp_path / "run", "tiny-moe", *words, NPROC="2"))
