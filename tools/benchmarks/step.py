"""Whole runs of a recipe: start-up, step time, tokens/s, model FLOP utilisation, memory.

Sides (MoA and its baseline, or others) run in turn, so that a drift of the machine meets all of
them; quote the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moa_megatron import telemetry
from tools.benchmarks import report, runs
from tools.benchmarks.sides import SIDES

ROOT = Path(__file__).resolve().parents[2]

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


def start_up(recipe: str, flags: str) -> dict[str, float]:
    """Seconds from a fresh interpreter to accepted arguments, corpus already prepared."""
    with tempfile.TemporaryDirectory() as folder:
        words = [recipe, "--run-dir", f"{folder}/run", *flags.split()]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _START_UP, *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
    if done.returncode:
        raise runs.RunFailed(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def timed_run(options: argparse.Namespace, side: str, *more: str) -> runs.Run:
    """One run of a side; raises RunFailed with the output of one that failed."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*SIDES[side].flags, *options.flags.split(), "--set", "save=null"]
        words += ["--train-iters", str(options.steps), *more]
        try:
            done = runs.train(options.recipe, Path(folder, "run"), words)
        except BaseException:  # Ctrl-C and SIGTERM, too
            runs.end_all()
            raise
    if done.code or done.step_ms is None:
        raise runs.RunFailed(f"{side}: exit code {done.code}\n{done.output}")
    return done


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs of the benchmark; raises RunFailed with the output of one that failed."""
    cold = None
    if "--mock-data" not in options.flags:
        with tempfile.TemporaryDirectory() as empty:
            words = ("--train-iters", "3", "--moa-cache-dir", f"{empty}/cache")
            cold = timed_run(options, options.sides[0], *words).first_s
        print(f"first step {cold:.1f} s after the command, corpus not yet prepared", flush=True)
    starts: list[float] = []
    done: dict[str, list[runs.Run]] = {name: [] for name in options.sides}
    for pair in range(options.pairs):
        for name in options.sides:
            run = timed_run(options, name)
            starts.append(run.first_s)
            done[name].append(run)
            print(
                f"round {pair + 1} {name:<16} start {run.first_s:5.1f} s  {_words(run)}", flush=True
            )
    starts_up = [start_up(options.recipe, options.flags) for _ in range(options.pairs)]
    return {
        "recipe": options.recipe,
        "flags": options.flags,
        "sides": {name: _side(each, done[options.sides[0]]) for name, each in done.items()},
        "start_up_s": {
            name: statistics.median(each[name] for each in starts_up) for name in starts_up[0]
        },
        "first_iteration_s": {"cold": cold, "warm": statistics.median(starts)},
    }


def _side(done: list[runs.Run], first: list[runs.Run]) -> dict[str, Any]:
    """Medians over the rounds, and step times over the first side's of the same round."""

    def median(values: list[float | None]) -> float | None:
        known = [value for value in values if value]
        return statistics.median(known) if known else None

    ratios = [a.step_ms / b.step_ms for a, b in zip(done, first, strict=True)]  # type: ignore[operator]
    flops = median([run.flops_per_s for run in done])
    peak = _peak_flops()
    return {
        "step_ms": median([run.step_ms for run in done]),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "tokens_per_s": median([run.tokens_per_s for run in done]),
        "flops_per_s": flops,
        "utilisation": flops / peak if flops and peak else None,
        "peak_bytes": median([run.peak_bytes for run in done]),
    }


def _peak_flops() -> float | None:
    """FLOP/s in bf16 of this GPU by its data sheet; None for one that is not in the table.

    The table holds SXM modules; cards of the same name on PCIe are slower.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    from moa_megatron.costs.gpus import GPUS

    name = torch.cuda.get_device_name().lower()
    if "pcie" in name or "nvl" in name:
        return None
    return next((gpu.bf16 for key, gpu in GPUS.items() if key.split("-")[0] in name), None)


def _words(run: runs.Run) -> str:
    parts = [f"step {run.step_ms:7.1f} ms"]
    if run.tokens_per_s:
        parts.append(f"{run.tokens_per_s:,.0f} tokens/s")
    if run.peak_bytes:
        parts.append(f"{run.peak_bytes / 2**30:.1f} GiB")
    return "  ".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this mode."""
    parser.add_argument("--recipe", default="tiny-moe", help="default: tiny-moe")
    parser.add_argument("--steps", type=int, default=30, help="steps of each run; default: 30")
    parser.add_argument("--pairs", type=int, default=3, help="rounds of runs; default: 3")
    parser.add_argument(
        "--sides",
        nargs="+",
        metavar="SIDE",
        default=["fixed", "moa"],
        help=f"in turn, the first is the baseline; of {', '.join(SIDES)}; default: fixed moa",
    )
    parser.add_argument("--flags", default="", help="for every run, such as '--micro-batch-size 8'")
    parser.add_argument(
        "--at-least",
        nargs="+",
        metavar="SIDE=RATIO",
        default=[],
        help="exit code 1 where a side has less of the first one's throughput, as in moa=0.96",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the report and returns it.

    Raises:
        ValueError: for a side that is none, or a target of none.
        RunFailed: with the output of a failed run.
    """
    report.known("sides", options.sides, SIDES)
    wanted = _targets(options)
    runs.end_with_tool()
    result = measure(options)
    print(table(result["sides"]))
    print("start-up, seconds:", json.dumps(result["start_up_s"]))
    result["targets"] = {}
    for name, least in wanted.items():
        reached = 1.0 / result["sides"][name]["ratio"]["median"]
        met = reached >= least
        result["targets"][name] = {"at_least": least, "reached": reached, "met": met}
        said = f"{name} has {reached:.4f} of {options.sides[0]}'s throughput"
        print(f"target {'met' if met else 'missed'}: {said}, at least {least:g} is wanted")
    return result


def _targets(options: argparse.Namespace) -> dict[str, float]:
    """Throughput over the first side's that is wanted of others."""
    found = {}
    for word in options.at_least:
        name, _, number = word.partition("=")
        report.known("at-least", [name], options.sides[1:])
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"--at-least {word}: needs a number, as in moa=0.96") from None
    return found


def table(sides: dict[str, dict[str, Any]]) -> str:
    """For people; utilisation is of the GPU's peak in bf16, for FP8 too."""

    def cell(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value * scale, form)

    header = ("side", "step ms", "over the first", "(min-max)", "tokens/s", "MFU", "peak GiB")
    rows = [
        (
            name,
            f"{each['step_ms']:.1f}",
            f"{each['ratio']['median']:.3f}",
            f"{each['ratio']['min']:.3f}-{each['ratio']['max']:.3f}",
            cell(each["tokens_per_s"], ",.0f"),
            cell(each["utilisation"], ".1%"),
            cell(each["peak_bytes"], ".1f", 2.0**-30),
        )
        for name, each in sides.items()
    ]
    return telemetry.table(header, rows)
