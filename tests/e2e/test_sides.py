"""Sides of a recipe, trained for real in small: their losses compared, their steps timed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT, SMALL_MOE, environment
from tests.helpers.slurm import marked_processes

pytestmark = pytest.mark.slow


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    print(done.stdout, done.stderr)
    return done


def test_losses_of_one_recipe_agree(tmp_path: Path) -> None:
    flags = ["--steps", "8", "--out", str(tmp_path / "out"), "--flags", " ".join(SMALL_MOE)]
    words = ["tools/check_numerics.py", "tiny-moe", "--jobs", "2", *flags]
    done = tool(*words, "--sides", "recompute-moe", "recompute-moe-act")
    assert done.returncode == 0
    rows = {row["side"]: row for row in json.loads(done.stdout.splitlines()[-1])["sides"]}
    assert list(rows) == ["fp32", "bf16", "grouped", "recompute-moe", "recompute-moe-act"]
    assert {row["verdict"] for row in rows.values()} == {"reference", "within"}
    assert rows["recompute-moe"]["difference"] == rows["recompute-moe-act"]["difference"] == 0.0
    assert rows["bf16"]["difference"] != 0.0, "two number formats"
    again = tool(*words, "--sides", "bf16")
    assert again.returncode == 0 and "[2/2]" in again.stdout


def test_a_stopped_comparison_leaves_no_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--steps", "100000", "--out", str(out), "--flags", " ".join(SMALL_MOE)]
    command = [sys.executable, "tools/check_numerics.py", "tiny-moe", "--sides", "bf16", *words]
    process = subprocess.Popen([*command, "--jobs", "2"], cwd=ROOT, env=environment())
    deadline = time.monotonic() + 120
    logs = [out / "fp32.log", out / "bf16.log"]
    while not all(log.exists() and "iteration " in log.read_text() for log in logs):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    assert len(marked_processes(str(out / "fp32"))) > 0
    process.terminate()
    assert process.wait(30) == 143
    time.sleep(2)
    assert not marked_processes(str(out))
    assert (out / "table.md").read_text().count("unfinished") == 2


def test_steps_of_sides_are_timed_in_turn() -> None:
    flags = ["--steps", "5", "--pairs", "1", "--flags", " ".join(SMALL_MOE)]
    done = tool("tools/bench.py", "--step", *flags, "--sides", "fixed", "bf16")
    assert done.returncode == 0
    sides = json.loads(done.stdout.splitlines()[-1])["sides"]
    assert list(sides) == ["fixed", "bf16"]
    assert sides["fixed"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    for side in sides.values():
        assert side["step_ms"] > 0
        assert side["tokens_per_s"] == pytest.approx(4 * 32 * 1e3 / side["step_ms"], rel=0.2)
        assert side["utilisation"] is side["peak_bytes"] is None, "no GPU"
    failed = tool("tools/bench.py", "--step", *flags, "--sides", "fp8-delayed")
    assert failed.returncode == 1 and "a run failed: fp8-delayed: exit code 78" in failed.stderr
