"""Whole runs of a recipe: start-up and training steps, MoA over Megatron's fixed activation.

MoA and baseline run in turn, so that a drift of the machine meets both; quote the ratios.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_ITERATION = re.compile(r"iteration +(\d+)/.*elapsed time per iteration \(ms\): ([0-9.]+)")
VARIANTS = {"moa": ["--moa-mixing", "moa"], "fixed": ["--moa-mixing", "fixed"]}

# Seconds before training starts, split into what Megatron needs anyway and what comes on top.
_START_UP = """
import json, sys, time
clock, spent = time.perf_counter, {"megatron": 0.0}
begin = clock()
import torch
from moa_megatron import recipes
torch_ready = clock()
from moa_megatron import host
host.install()
hosted = clock()
import megatron.training.training, megatron.training.argument_utils
imported = clock()
from moa_megatron import arguments, launch, patches
patches.apply()
def timed(module, name):
    function = getattr(module, name)
    def run(*words, **keywords):
        start = clock()
        try:
            return function(*words, **keywords)
        finally:
            spent["megatron"] += clock() - start
    setattr(module, name, run)
timed(arguments, "parse_args")
timed(launch, "validate_args")
timed(launch.models, "hybrid_config_from_args")
launch.prepare(recipes.parse_command_line(sys.argv[1:]), host.HOST_ARGS if host.active() else [])
ready = clock()
upstream = torch_ready - begin + imported - hosted + spent["megatron"]
print(json.dumps({"megatron": upstream, "moa_megatron": ready - begin - upstream}))
"""


def start_up(recipe: str) -> dict[str, float]:
    """Seconds from a fresh interpreter to accepted arguments, corpus already prepared."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _START_UP, recipe, "--run-dir", f"{folder}/run"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def timed_run(recipe: str, steps: int, words: list[str], cache: Path | None) -> tuple[float, float]:
    """Seconds from the command to its first iteration, and median milliseconds of the others."""
    first, times = 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        command = [str(ROOT / "launch" / "local.sh"), recipe, "--run-dir", f"{folder}/run"]
        command += ["--train-iters", str(steps), "--log-interval", "1", "--eval-iters", "0"]
        command += ["--set", "save=null", *words]
        if cache is not None:
            command += ["--moa-cache-dir", str(cache)]
        begin = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            output.append(line)
            found = _ITERATION.search(line)
            if not found:
                continue
            if not first:
                first = time.perf_counter() - begin
            times.append(float(found.group(2)))
        if process.wait() or len(times) < 3:
            raise RuntimeError("".join(output))
    # Megatron counts its first iteration into the second one's mean.
    return first, statistics.median(times[2:])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs of the benchmark; raises RuntimeError with the output of one that failed."""
    with tempfile.TemporaryDirectory() as empty:
        cold, _ = timed_run(options.recipe, 3, VARIANTS["moa"], Path(empty, "cache"))
    print(f"first iteration {cold:.1f} s after the command, corpus not yet prepared", flush=True)
    starts: list[float] = []
    steps: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for pair in range(options.pairs):
        for name, words in VARIANTS.items():
            start, step = timed_run(options.recipe, options.steps, words, None)
            starts.append(start)
            steps[name].append(step)
            print(
                f"pair {pair + 1} {name:<6} start {start:5.1f} s  step {step:7.1f} ms", flush=True
            )
    starts_up = [start_up(options.recipe) for _ in range(options.pairs)]
    ratios = [a / b for a, b in zip(steps["moa"], steps["fixed"], strict=True)]
    return {
        "recipe": options.recipe,
        "step_ratio_moa_over_fixed": {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
        },
        "step_ms": {name: statistics.median(values) for name, values in steps.items()},
        "start_up_s": {
            name: statistics.median(each[name] for each in starts_up) for name in starts_up[0]
        },
        "first_iteration_s": {"cold": cold, "warm": statistics.median(starts)},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this mode."""
    parser.add_argument("--recipe", default="tiny-moe", help="default: tiny-moe")
    parser.add_argument("--steps", type=int, default=30, help="steps of each run; default: 30")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs; default: 3")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the report and returns it; raises RuntimeError with the output of a failed run."""
    result = measure(options)
    ratio = result["step_ratio_moa_over_fixed"]
    print(
        f"step time, MoA over fixed: {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
    )
    print("start-up, seconds:", json.dumps(result["start_up_s"]))
    return result
