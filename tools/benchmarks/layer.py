"""One whole FFN: Megatron's MLP with SwiGLU against MoA's, forward and backward, in turn.

Kinds: a dense FFN, and one fine-grained expert with its own gate and routing weights. Beside the
whole layers it times their parts (gate logits, mixture, linear layers), and what folding the gate
into W1 could save: one product [2D+n, d] against two, as plain matrix products.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch

from moa_megatron import op
from moa_megatron.config import MoAConfig
from tools.benchmarks import ffn, report
from tools.benchmarks.timing import PASSES, Clock, Times, fastest, memory, race, ratios

WIDTHS = {"cuda": {"dense": 3413, "expert": 853}, "cpu": {"dense": 688, "expert": 172}}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"dtype": ["bf16"], "rows": [16384], "hidden_size": 1280},
    "cpu": {"dtype": ["fp32"], "rows": [4096], "hidden_size": 256},
}
PARTS = ("gate", "mixture", "fc1", "fc2")
_FORM = "{:<6} {:<7} {:<5} {:>6} {:>5} {:>5} {:>9} {:>5} {:>5} {:>5} {:>13} {:>5} {:>7} {:>7}"
_FORM += " {:>8} {:>8} {:>6} {:>6}"
_HEADINGS = (
    *("kind", "variant", "dtype", "rows", "d", "D", "both ms", "fwd/", "bwd/", "both/"),
    *("(min-max)", "gate", "mixture", "linears", "MiB", "MiB base", "folded", "padded"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this mode."""
    report.add_shared_arguments(parser)
    parser.add_argument(
        "--kinds", nargs="+", metavar="KIND", default=["dense", "expert"], help="default: both"
    )
    parser.add_argument("--hidden-size", type=int, metavar="d", help="width of the model")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the report and returns it.

    Raises:
        CheckFailed: if a MoA layer disagrees with the reference.
        ValueError: for an option out of its choices.
    """
    device = report.settle(options, DEFAULTS)
    configs = {name: MoAConfig(variant=name, backend=options.backend) for name in options.variants}
    groups = [{k: c for k, c in configs.items() if c.gated == gated} for gated in (True, False)]
    cases = list(itertools.product(_shapes(options), filter(None, groups)))
    with ffn.megatron(device):
        for shape, chosen in cases:
            _check(shape, chosen, device)
        clock = Clock(device)
        print(report.heading(options, clock.method))
        print("/: over the best SwiGLU layer; gate, mixture, linears: alone, over the whole layer;")
        print("MiB: kept (CPU) or peak (CUDA); folded, padded: one product over separate ones")
        print(_FORM.format(*_HEADINGS))
        rows = []
        for shape, chosen in cases:
            for row in _measured(shape, chosen, options.repeats, clock, device):
                print(_line(row), flush=True)
                rows.append(row)
    return {"mode": "layer", **report.conditions(options, clock.method), "results": rows}


def _shapes(options: argparse.Namespace) -> list[ffn.Shape]:
    report.known("kinds", options.kinds, ("dense", "expert"))
    widths = {kind: options.width or [WIDTHS[options.device][kind]] for kind in options.kinds}
    return [
        ffn.Shape(kind, dtype, rows, options.hidden_size, width)
        for kind, dtype, rows in itertools.product(options.kinds, options.dtype, options.rows)
        for width in widths[kind]
    ]


def _check(shape: ffn.Shape, configs: dict[str, MoAConfig], device: torch.device) -> None:
    report.say(f"checking {', '.join(configs)} {shape}")
    inputs = ffn.make_inputs(shape, device)
    for module in ffn.moa_layers(shape, configs, device).values():
        ffn.check(module, shape, inputs)


def _measured(
    shape: ffn.Shape,
    configs: dict[str, MoAConfig],
    repeats: int,
    clock: Clock,
    device: torch.device,
) -> list[dict[str, Any]]:
    """One row per variant; whole layers and parts of all are timed in the same rounds."""
    report.say(f"compiling baselines for {shape}")
    inputs = ffn.make_inputs(shape, device)
    fixed = ffn.fixed_layers(shape, next(iter(configs.values())).gated, device)
    layers = fixed | ffn.moa_layers(shape, configs, device)
    contenders = {name: ffn.whole(module, inputs) for name, module in layers.items()}
    used = {name: memory(each, device) for name, each in contenders.items()}
    for name in configs:
        inner = ffn.parts(layers[name], inputs) | ffn.folding(layers[name], inputs)
        contenders |= {f"{name} {part}": each for part, each in inner.items()}
    report.say(f"timing {shape}")
    times = race(contenders, repeats, clock)
    best = fastest(times, fixed)
    return [
        {
            "variant": name,
            **dataclasses.asdict(shape),
            "backend": op.resolve_backend(config.backend, device.type, report.DTYPES[shape.dtype]),
            **times[name].medians(),
            "best": best,
            "fixed": {each: times[each].medians() for each in fixed},
            "ratio": ratios(times[name], times[best]),
            "parts": {part: times[f"{name} {part}"].medians() for part in PARTS},
            "share": _shares(name, times),
            "folding": {
                form: ratios(times[f"{name} {form}"], times[f"{name} separate"])
                for form in ("folded", "padded")
            },
            "memory": {each: used[each] for each in (name, *fixed)},
            "device": device.type,
        }
        for name, config in configs.items()
    ]


def _shares(name: str, times: dict[str, Times]) -> dict[str, dict[str, float]]:
    """Time of each part over the whole layer's in the same round, median, by pass."""
    return {
        part: {
            pass_: each["median"]
            for pass_, each in ratios(times[f"{name} {part}"], times[name]).items()
        }
        for part in PARTS
    }


def _line(row: dict[str, Any]) -> str:
    share = {part: row["share"][part]["both"] for part in PARTS}
    spread = row["ratio"]["both"]
    kind = "peak_bytes" if row["device"] == "cuda" else "saved_bytes"
    used = [row["memory"][name][kind] / 2**20 for name in (row["variant"], row["best"])]
    return _FORM.format(
        *(row[key] for key in ("kind", "variant", "dtype", "rows", "hidden_size", "width")),
        f"{row['both_ms']:.3f}",
        *(f"{row['ratio'][name]['median']:.2f}" for name in PASSES),
        f"({spread['min']:.2f}-{spread['max']:.2f})",
        *(f"{each:.0%}" for each in (share["gate"], share["mixture"])),
        f"{share['fc1'] + share['fc2']:.0%}",
        *(f"{each:.1f}" for each in used),
        *(f"{row['folding'][form]['both']['median']:.2f}" for form in ("folded", "padded")),
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Parts of each MoA layer stacked, over the time of the best SwiGLU layer."""
    rows = result["results"]
    best = [row["fixed"][row["best"]]["both_ms"] for row in rows]
    report.draw_bars(
        [f"{r['kind']} {r['variant']} {r['dtype']}\n{r['hidden_size']}x{r['width']}" for r in rows],
        {p: [r["parts"][p]["both_ms"] / b for r, b in zip(rows, best)] for p in PARTS},
        "time over the best SwiGLU layer's",
        "parts of a MoA layer, each timed alone, forward and backward",
        path,
        stacked=True,
        marks={"whole layer": [row["ratio"]["both"]["median"] for row in rows]},
    )
