#!/usr/bin/env python3
"""Plans a run: does it fit, at which layout, how long, for how much; prints the commands.

    .venv/bin/python tools/plan.py moe-2b --gpus 64 --gpu h100
    .venv/bin/python tools/plan.py dense-0.5b --gpus 8 --gpu a100-80 --mfu 0.41 --price 1.8
    .venv/bin/python tools/plan.py moe-2b --gpus 8 --gpu h100 --seq-length 8192 --json
    .venv/bin/python tools/plan.py --list --gpu h200

RECIPE and all flags not listed below are those of ./launch/local.sh; sizes and micro-batches named
there stay as they are. Trains nothing and needs no GPU. What the numbers are: docs/planning.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moa_megatron import host, recipes, runstate  # noqa: E402
from moa_megatron.costs.gpus import GPUS, Gpu, assumed_mfu  # noqa: E402
from moa_megatron.recipes import RefusedError  # noqa: E402
from tools.planner.page import show, show_list  # noqa: E402

_SHOWN = 8
_JOB_HOURS = 24
_GROWTH = (2, 4, 8, 16, 32, 64)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and the flags of training."""
    parser = recipes.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, kinds = parser.add_argument, ", ".join(GPUS)
    add("recipe", nargs="?", help=f"{', '.join(recipes.language_models())}, or a .yaml file")
    add("--gpus", type=int, metavar="N", help="GPUs in all")
    add("--gpu", default="h100", metavar="KIND", help=f"{kinds} (default h100)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs joined by NVLink (8)")
    add("--mfu", type=float, help="measured model FLOPs utilisation, such as 0.38")
    add("--price", type=float, metavar="P", help="price of a GPU-hour, in any currency")
    add("--all", action="store_true", help=f"every legal layout, not the first {_SHOWN}")
    add("--list", action="store_true", help="all recipes: sizes, FLOPs, GPU-days")
    add("--json", action="store_true", help="everything as JSON")
    options, flags = parser.parse_known_args(argv)
    problems = []
    if options.gpu not in GPUS:
        problems.append(f"--gpu {options.gpu} is not known; choose from {kinds}")
    if options.mfu is not None and not 0 < options.mfu <= 1:
        problems.append(f"--mfu {options.mfu}: must be above 0 and at most 1, such as 0.38")
    if options.price is not None and options.price < 0:
        problems.append(f"--price {options.price}: must not be negative")
    if options.gpus_per_node < 1:
        problems.append(f"--gpus-per-node {options.gpus_per_node}: must be at least 1, such as 8")
    elif not options.list:
        problems += _size_problems(options)
    if problems:
        raise RefusedError("\n".join(problems))
    return options, flags


def _size_problems(options: argparse.Namespace) -> list[str]:
    if options.recipe is None or options.recipe.startswith("-"):
        return [
            f"the recipe comes first: one of {', '.join(recipes.language_models())}, or use --list"
        ]
    gpus, node = options.gpus, options.gpus_per_node
    if gpus is None or gpus < 1:
        return [f"--gpus {gpus}: say how many GPUs there are, such as --gpus 8"]
    if gpus > node and gpus % node:
        lower = gpus // node * node
        return [f"--gpus {gpus} are no whole nodes of {node}: use {lower} or {lower + node}"]
    return []


def hours(model: Any, choice: Any) -> float:
    """Wall-clock hours of the whole run."""
    return float(choice.seconds * model.steps / 3600)


def commands(model: Any, cluster: Any, choice: Any) -> list[str]:
    """What starts the run: on a cluster, and on one machine where one holds all GPUs."""
    flags = [*model.words, *choice.flags(model.given, model.args.micro_batch_size)]
    nodes = max(1, cluster.gpus // cluster.gpus_per_node)
    # A quarter more than predicted, and an hour for starting and saving.
    needed = 1.25 * hours(model, choice) + 1
    count = math.ceil(needed / _JOB_HOURS)
    limit = f"{min(_JOB_HOURS, math.ceil(needed)):02d}:00:00"
    where = ["--nodes", str(nodes), "--gpus-per-node", str(cluster.gpus // nodes)]
    where += ["--time", limit, *(["--chain", str(count)] if count > 1 else [])]
    found = [shlex.join(["./launch/submit.py", model.recipe, *where, *flags])]
    if nodes == 1:
        local = shlex.join(["./launch/local.sh", model.recipe, *flags])
        found.append(f"NPROC={cluster.gpus} {local}")
    return found


def facts(model: Any, cluster: Any, choice: Any) -> dict[str, Any]:
    """Everything about a choice, in bytes, seconds and counts."""
    from moa_megatron.costs.parameters import weights
    from moa_megatron.planning import fits

    memory, time = choice.memory, hours(model, choice)
    stages = [
        weights(choice.args, model.moa, choice.args.padded_vocab_size, choice.layout, stage)
        for stage in range(choice.layout.pp)
    ]
    found = {
        "layout": dataclasses.asdict(choice.layout),
        "micro_batch_size": choice.micro_batch,
        "recompute": choice.recompute,
        "use_distributed_optimizer": choice.sharded,
        "fits": fits(choice, cluster),
        "advice": list(choice.advice),
        "parameters_per_rank": [sum(w.numel * w.copies for w in stage) for stage in stages],
        "memory": {
            **dataclasses.asdict(memory.states),
            **{f"activations_{k}": v for k, v in vars(memory.activations).items()},
            "quantised_weights": memory.quantised,
            "fragmentation": memory.fragmentation,
            "total": memory.total,
            "stage": memory.stage,
        },
        "step_seconds": choice.seconds,
        "tokens_per_second": model.step_tokens / choice.seconds,
        "hours": time,
        "gpu_hours": time * cluster.gpus,
        "flags": choice.flags(model.given, model.args.micro_batch_size),
    }
    if cluster.price is not None:
        found["cost"] = found["gpu_hours"] * cluster.price
    return found


def report(model: Any, cluster: Any) -> dict[str, Any]:
    """The plan.

    Raises:
        RefusedError: where no legal layout fits, with what would.
    """
    from moa_megatron import costs, planning

    choices, refused = planning.choices(model, cluster)
    if not choices:
        reasons = sorted({reason for reasons in refused.values() for reason in reasons})
        raise RefusedError("no layout is legal:\n" + "\n".join(reasons[:8]))
    if not planning.fits(choices[0], cluster):
        raise RefusedError(_nothing_fits(model, cluster, choices[0]))
    flops = model.flops()
    count = costs.parameters(model.args, model.moa, model.args.padded_vocab_size)
    fp8 = bool(model.args.fp8)
    assumed = assumed_mfu(cluster.gpu, bool(model.args.num_experts), fp8)
    return {
        "recipe": model.recipe,
        "gpus": cluster.gpus,
        "gpu": {"kind": cluster.kind, **dataclasses.asdict(cluster.gpu)},
        "parameters": dataclasses.asdict(count),
        "flops_per_token": {
            **dataclasses.asdict(flops),
            "forward_all": flops.forward,
            "training_all": flops.training,
            "model": flops.model,
        },
        "tokens": model.tokens,
        "steps": model.steps,
        "flops": flops.model * model.tokens,
        "mfu": cluster.mfu or assumed,
        "mfu_is": "measured" if cluster.mfu else "assumed",
        "layouts": [facts(model, cluster, choice) for choice in choices],
        "names": [str(choice.layout) for choice in choices],
        "refused": refused,
        "commands": commands(model, cluster, choices[0]),
    }


def _nothing_fits(model: Any, cluster: Any, best: Any) -> str:
    """The refusal, with the changes that would help."""
    from moa_megatron import planning

    need, have = best.memory.total / 1e9, cluster.gpu.memory / 1e9
    lines = [
        f"{model.recipe} does not fit {cluster.gpus} {cluster.gpu.title}: the leanest layout, "
        f"{best.layout}, micro-batch {best.micro_batch}, recomputation {best.recompute}, needs "
        f"{need:.1f} GB of {have:.0f} GB"
    ]
    if model.given & {"micro_batch_size", "recompute_granularity", "tensor_model_parallel_size"}:
        lines.append("without your own micro-batch, recomputation and sizes more layouts are tried")
    trials = [(kind, cluster.gpus) for kind in GPUS if GPUS[kind].memory > cluster.gpu.memory]
    whole = [cluster.gpus * factor for factor in _GROWTH]
    node = cluster.gpus_per_node
    trials += [(cluster.kind, gpus) for gpus in whole if gpus <= node or gpus % node == 0]
    for kind, gpus in trials:
        other = dataclasses.replace(cluster, kind=kind, gpus=gpus)
        choices, _ = planning.choices(model, other)
        if choices and planning.fits(choices[0], other):
            lines.append(f"fits: --gpus {gpus} --gpu {kind} ({choices[0].layout})")
            if kind == cluster.kind:
                break
    return "\n".join(lines)


def listed(gpu: Gpu, cluster_mfu: float | None, flags: list[str]) -> list[dict[str, Any]]:
    """One row for each recipe."""
    from moa_megatron import costs, planning

    rows = []
    for name in recipes.language_models():
        model = planning.read(name, flags)
        count = costs.parameters(model.args, model.moa, model.args.padded_vocab_size)
        mfu = cluster_mfu or assumed_mfu(gpu, bool(model.args.num_experts), bool(model.args.fp8))
        total = model.flops().model * model.tokens
        days = total / (gpu.peak(bool(model.args.fp8)) * mfu) / 86400
        row = {"recipe": name, **dataclasses.asdict(count), "tokens": model.tokens}
        rows.append({**row, "flops": total, "mfu": mfu, "gpu_days": days})
    return rows


def main(argv: list[str]) -> int:
    """Plans; returns an exit code of the exit contract."""
    options, flags = parse(argv)
    if options.recipe:
        recipes.load(options.recipe)  # a wrong name need not wait for Megatron's import
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    host.install()
    from moa_megatron import planning

    if options.list:
        words = ([options.recipe] if options.recipe else []) + flags
        rows = listed(GPUS[options.gpu], options.mfu, words)
        lines = show_list(rows, GPUS[options.gpu])
        print(json.dumps(rows, indent=1) if options.json else "\n".join(lines))
        return runstate.FINISHED
    model = planning.read(options.recipe, flags)
    kind, node = options.gpu, options.gpus_per_node
    cluster = planning.Cluster(options.gpus, kind, node, options.mfu, options.price)
    if model.args.fp8 and cluster.gpu.fp8 is None:
        raise RefusedError(f"--fp8-format: {cluster.gpu.title} has no FP8; leave it out")
    plan = report(model, cluster)
    lines = show(plan, None if options.all else _SHOWN)
    print(json.dumps(plan, indent=1) if options.json else "\n".join(lines))
    return runstate.FINISHED


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RefusedError as refusal:
        sys.stderr.write(f"refused: {refusal}\n")
        sys.exit(runstate.REFUSED)
