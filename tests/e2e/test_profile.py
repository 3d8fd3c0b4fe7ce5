"""./launch/profile.sh as a user starts it: torch's profiler for real, nsys as a dry run."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

from tests.e2e.runs import ROOT, SMALL_MOE, _run, environment

PROFILE = str(ROOT / "launch" / "profile.sh")


def test_torch_profiler_shows_our_ranges(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    window = ["--profile-step-start", "2", "--profile-step-end", "4"]
    # An evaluation inside the window would add ranges of its layers.
    window += ["--eval-interval", "6"]
    command = [PROFILE, "tiny-moe", "--torch-profiler", *SMALL_MOE, *window]
    outcome = _run([*command, "--run-dir", str(folder)], folder, environment())
    assert outcome.code == 0
    trace = folder / "torch_profile" / "rank-0.json.gz"
    assert str(trace) in outcome.output and "ui.perfetto.dev" in outcome.output
    with gzip.open(trace) as stream:
        events = json.load(stream)["traceEvents"]
    names = Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
    # Two steps of two micro-batches and two layers; torch's window opens a step before nsys's.
    assert names["train.step 2"] == names["train.step 3"] == 2 and "train.step 4" not in names
    assert names["moe.router"] == names["moe.experts"] == 2 * 2 * 2
    assert names["moe.dispatch"] == names["moe.combine"] == 2 * names["moe.router"]
    # Eight experts one by one, and the shared one.
    for name in ("moa.gate", "moa.fc1", "moa.mixture", "moa.fc2"):
        assert names[name] == 9 * names["moe.router"]


def test_dry_run_prints_the_command_of_nsys_and_refuses_a_bad_window(tmp_path: Path) -> None:
    dry = environment(DRY_RUN="1")
    command = [PROFILE, "tiny-moe", *SMALL_MOE, "--run-dir", str(tmp_path / "run")]
    good = [*command, "--profile-step-start", "2", "--profile-step-end", "4"]
    outcome = _run(good, tmp_path, dry)
    assert outcome.code == 0
    assert "would capture: nsys profile --trace nvtx,cuda" in outcome.output
    assert not (tmp_path / "run").exists()
    outcome = _run(command, tmp_path, dry)
    assert outcome.code == 78
    assert "--profile-step-end=13 is never reached with --train-iters=6" in outcome.output
