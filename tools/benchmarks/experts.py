"""All routed experts of a rank: sequential, grouped, on Transformer Engine, over fixed SwiGLU.

Every MoA contender is first held against the definition in float64, one expert after the other.
Without Transformer Engine the baseline is Megatron's sequential experts, which is no match for
grouped ones on a GPU: its ratios there say nothing about MoA.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moa_megatron.config import MoAConfig
from tools.benchmarks import grouped, report
from tools.benchmarks.ffn import megatron
from tools.benchmarks.timing import PASSES, Clock, Contender, Times, fastest, memory, race, ratios

DEFAULTS: dict[str, dict[str, Any]] = {
    # moe-2b on one GPU: 4 sequences of 1024 tokens to 4 of 32 experts, widths aligned.
    "cuda": {
        **{"dtype": ["bf16"], "rows": [16384], "hidden_size": 1280, "width": [896]},
        "experts_per_rank": 32,
    },
    "cpu": {
        **{"dtype": ["fp32"], "rows": [1024], "hidden_size": 256, "width": [172]},
        "experts_per_rank": 4,
    },
}
_FORM = "{:<26} {:<5} {:>6} {:>7} {:>5} {:>5} {:>9} {:>5} {:>5} {:>5} {:>13} {:>8} {:>8}"
_HEADINGS = (
    *("experts", "dtype", "rows", "experts", "d", "D", "both ms", "fwd/", "bwd/", "both/"),
    *("(min-max)", "MiB", "error"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this mode."""
    report.add_shared_arguments(parser)
    parser.add_argument("--hidden-size", type=int, metavar="d", help="width of the model")
    parser.add_argument("--experts-per-rank", type=int, metavar="N", help="default: CUDA 32, CPU 4")
    parser.add_argument(
        "--scopes",
        nargs="+",
        metavar="SCOPE",
        default=["layer", "expert"],
        help="gates of layers, of experts; default: both",
    )
    parser.add_argument(
        "--fp8",
        nargs="+",
        metavar="RECIPE",
        default=[],
        help=f"also in FP8, on Transformer Engine: {', '.join(grouped.FP8)}",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the report and returns it.

    Raises:
        CheckFailed: if experts disagree with the definition.
        ValueError: for an option out of its choices.
    """
    device = report.settle(options, DEFAULTS)
    report.known("variants", options.variants, ("one", "bi", "qd"))  # those of the baseline's width
    report.known("scopes", options.scopes, ("layer", "expert"))
    report.known("fp8", options.fp8, grouped.FP8)
    if options.experts_per_rank < 1:
        raise ValueError(f"--experts-per-rank {options.experts_per_rank}: must be positive")
    if options.fp8 and not grouped.has_engine():
        raise ValueError(f"--fp8 {' '.join(options.fp8)}: needs Transformer Engine, on a GPU")
    with megatron(device):
        clock = Clock(device)
        print(report.heading(options, clock.method))
        print("/: over the fastest fixed experts in the same dtype; MiB: kept (CPU) or peak (CUDA)")
        print(_FORM.format(*_HEADINGS))
        rows = []
        for shape in _shapes(options):
            for row in _measured(shape, options, clock, device):
                print(_line(row), flush=True)
                rows.append(row)
    return {"mode": "experts", **report.conditions(options, clock.method), "results": rows}


def _shapes(options: argparse.Namespace) -> list[grouped.Shape]:
    cases = itertools.product(options.dtype, options.rows, options.width)
    return [
        grouped.Shape(dtype, rows, options.hidden_size, width, options.experts_per_rank)
        for dtype, rows, width in cases
    ]


def _kinds(options: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    """Names and FP8 recipes of what is built."""
    yield from (("sequential", None), ("grouped", None))
    if grouped.has_engine():
        yield "engine", None
        yield from (("engine", recipe) for recipe in options.fp8)


def _measured(
    shape: grouped.Shape, options: argparse.Namespace, clock: Clock, device: torch.device
) -> list[dict[str, Any]]:
    """One row per contender; all are timed in the same rounds."""
    inputs = grouped.make_inputs(shape, device)
    contenders: dict[str, Contender] = {}
    facts: dict[str, dict[str, Any]] = {}
    for kind, recipe in _kinds(options):
        label = f"{kind} {recipe}" if recipe else kind
        if kind != "grouped":  # Megatron has none of its own
            fixed = grouped.build(kind, shape, None, device, recipe)
            contenders[f"{label} fixed"] = grouped.whole(fixed, inputs)
            facts[f"{label} fixed"] = {"kind": kind, "fp8": recipe, "variant": "fixed"}
        for variant, scope in itertools.product(options.variants, options.scopes):
            moa = MoAConfig(variant=variant, gate_scope=scope, backend=options.backend)
            name = f"{label} {variant} {scope}"
            report.say(f"checking {name} {shape}")
            experts = grouped.build(kind, shape, moa, device, recipe)
            errors = grouped.check(experts, shape, inputs, recipe)
            contenders[name] = grouped.whole(experts, inputs)
            facts[name] = {"kind": kind, "fp8": recipe, "variant": variant, "scope": scope}
            facts[name]["errors"] = errors
    used = {name: memory(each, device) for name, each in contenders.items()}
    report.say(f"timing {shape}")
    times = race(contenders, options.repeats, clock)
    return list(_rows(shape, facts, times, used, device))


def _rows(
    shape: grouped.Shape,
    facts: dict[str, dict[str, Any]],
    times: dict[str, Times],
    used: dict[str, dict[str, int | None]],
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    for name, about in facts.items():
        base = _baseline(facts, times, about)
        yield {
            "name": name,
            **about,
            **dataclasses.asdict(shape),
            **times[name].medians(),
            "baseline": base,
            "ratio": ratios(times[name], times[base]),
            "memory": used[name],
            "device": device.type,
        }


def _baseline(
    facts: dict[str, dict[str, Any]], times: dict[str, Times], about: dict[str, Any]
) -> str:
    """The fastest fixed experts of the same FP8 recipe, or without one."""
    fixed: Sequence[str] = [
        name
        for name, each in facts.items()
        if each["variant"] == "fixed" and each["fp8"] == about["fp8"]
    ]
    return fastest(times, fixed)


def _line(row: dict[str, Any]) -> str:
    spread = row["ratio"]["both"]
    kind = "peak_bytes" if row["device"] == "cuda" else "saved_bytes"
    error = max(row["errors"].values()) if "errors" in row else None
    return _FORM.format(
        *(row[key] for key in ("name", "dtype", "rows", "experts", "hidden_size", "width")),
        f"{row['both_ms']:.3f}",
        *(f"{row['ratio'][name]['median']:.2f}" for name in PASSES),
        f"({spread['min']:.2f}-{spread['max']:.2f})",
        f"{row['memory'][kind] / 2**20:.1f}",
        "" if error is None else f"{error:.1e}",
    )
