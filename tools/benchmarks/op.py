"""The op alone: MoA's mixture over SwiGLU, forward and backward, in one process and in turn.

Each configuration is first held against the float64 reference; if it fails, nothing is timed and
the exit code is 1. Bandwidth: bytes that a pass must move, over the time of a copy of as many.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa_megatron import op
from moa_megatron.config import MoAConfig
from moa_megatron.reference import mixture_reference
from tools.benchmarks import report, swiglu
from tools.benchmarks.timing import (
    CheckFailed,
    Clock,
    Contender,
    Times,
    fastest,
    memory,
    race,
    ratio,
    ratios,
    relative_rms,
)

DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"dtype": ["bf16"], "rows": [4096, 16384, 65536], "width": [853, 2048, 3413, 8192]},
    "cpu": {"dtype": ["fp32", "bf16"], "rows": [4096], "width": [2048]},
}
# Largest relative RMS error against the float64 reference: hidden vector, gradients.
BOUNDS = {"fp32": (1e-5, 1e-5), "bf16": (4e-3, 1e-2), "fp16": (1e-3, 2e-3)}
# Largest time over the best SwiGLU's, and smallest share of copy bandwidth, by pass.
TIME_TARGETS = {"cuda": {"one": 1.10, "bi": 1.10, "qd": 1.35}, "cpu": {"one": 1.25, "bi": 1.25}}
COPY_TARGETS = {"cuda": {"forward": 0.90, "backward": 0.80}, "cpu": {}}
CHECKED_ROWS = 64
_FORM = "{:<7} {:<5} {:>6} {:>6} {:>9} {:>9} {:>6} {:>6} {:>6} {:>13} {:>6} {:>6} {:>8} {:>8}  {}"
_HEADINGS = (
    *("variant", "dtype", "rows", "D", "fwd ms", "bwd ms", "fwd/", "bwd/", "both/", "(min-max)"),
    *("fwd bw", "bwd bw", "MiB", "MiB base", "target"),
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is timed: element type, tokens N, FFN width D."""

    dtype: str
    rows: int
    width: int

    def __str__(self) -> str:
        return f"{self.dtype} {self.rows} x {self.width}"


@dataclasses.dataclass
class Inputs:
    """Pre-activations [N, P], logits [N, n], token weights [N] or None, gradient [N, D]."""

    preact: Tensor
    logits: Tensor
    weight: Tensor | None
    grad: Tensor

    @property
    def differentiable(self) -> list[Tensor]:
        """What the op computes gradients of."""
        return [t for t in (self.preact, self.logits, self.weight) if t is not None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this mode."""
    report.add_shared_arguments(parser)
    parser.add_argument(
        "--weighted", action="store_true", help="with routing weights of tokens, as in experts"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the report and returns it.

    Raises:
        CheckFailed: if the op disagrees with the reference at any configuration.
        ValueError: for an option out of its choices.
    """
    device = report.settle(options, DEFAULTS)
    configs = {name: MoAConfig(variant=name, backend=options.backend) for name in options.variants}
    shapes = [Shape(*s) for s in _product(options.dtype, options.rows, options.width)]
    errors = {}
    for shape in shapes:
        for name, config in configs.items():
            report.say(f"checking {name} {shape}")
            errors[name, shape] = check(config, shape, options.weighted, device)
    clock = Clock(device)
    print(report.heading(options, clock.method))
    print("/: over the best fixed activation; bw: share of a copy's bandwidth; MiB: kept (CPU)")
    print("or peak (CUDA)")
    print(_FORM.format(*_HEADINGS))
    rows = []
    for shape in shapes:
        for gated in (True, False):
            chosen = {name: c for name, c in configs.items() if c.gated == gated}
            for row in _measured(chosen, shape, options, clock, device) if chosen else []:
                row["errors"] = errors[row["variant"], shape]
                print(_line(row), flush=True)
                rows.append(row)
    return {"mode": "op", **report.conditions(options, clock.method), "results": rows}


def _product(dtypes: list[str], rows: list[int], widths: list[int]) -> list[tuple[str, int, int]]:
    return [(dtype, n, width) for dtype in dtypes for width in widths for n in rows]


def make_inputs(config: MoAConfig, shape: Shape, weighted: bool, device: torch.device) -> Inputs:
    """Normal pre-activations of standard deviation 2, into the activations' tails."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    dtype = report.DTYPES[shape.dtype]
    preact = normal(shape.rows, shape.width * (1 + config.gated)).mul_(2).to(dtype)
    weight = normal(shape.rows).sigmoid_().requires_grad_() if weighted else None
    return Inputs(
        preact.requires_grad_(),
        normal(shape.rows, config.num_coefficients).requires_grad_(),
        weight,
        normal(shape.rows, shape.width).to(dtype),
    )


def check(
    config: MoAConfig, shape: Shape, weighted: bool, device: torch.device
) -> dict[str, float]:
    """Relative RMS errors on a slice of the rows, first and last among them.

    Raises:
        CheckFailed: naming configuration, tensor, error and bound.
    """
    inputs = make_inputs(config, shape, weighted, device)
    hidden = op.mixture(inputs.preact, inputs.logits, config, inputs.weight)
    actual = [hidden, *torch.autograd.grad(hidden, inputs.differentiable, inputs.grad)]
    rows = torch.linspace(0, shape.rows - 1, min(CHECKED_ROWS, shape.rows)).round().long()
    rows = rows.to(device)
    exact = [t.detach()[rows].double().requires_grad_() for t in inputs.differentiable]
    expected = mixture_reference(exact[0], exact[1], config, *exact[2:])
    grads = torch.autograd.grad(expected, exact, inputs.grad[rows].double())
    names = ("hidden", "grad_preact", "grad_logits", "grad_weight")
    errors = {
        name: relative_rms(one[rows], two)
        for name, one, two in zip(names, actual, [expected, *grads])
    }
    for name, error in errors.items():
        bound = BOUNDS[shape.dtype][name != "hidden"]
        if not error <= bound:
            raise CheckFailed(
                f"{config.variant} {shape}: relative RMS error of {name} {error:.1e}, "
                f"bound {bound:.0e}"
            )
    return errors


def bytes_moved(config: MoAConfig, shape: Shape, weighted: bool) -> dict[str, int]:
    """Bytes that a pass must read and write: each tensor once."""
    size = report.DTYPES[shape.dtype].itemsize
    preact, hidden = shape.width * (1 + config.gated) * size, shape.width * size
    gates = 4 * (config.num_coefficients + weighted)
    return {
        "forward": shape.rows * (preact + gates + hidden),
        "backward": shape.rows * (2 * preact + 2 * gates + hidden),
    }


def _measured(
    configs: dict[str, MoAConfig],
    shape: Shape,
    options: argparse.Namespace,
    clock: Clock,
    device: torch.device,
) -> list[dict[str, Any]]:
    """One row per variant, all of them, baselines and copies timed in the same rounds."""
    contenders, moved = {}, {}
    inputs = make_inputs(next(iter(configs.values())), shape, options.weighted, device)
    for name, config in configs.items():
        logits = torch.randn(shape.rows, config.num_coefficients, device=device)
        own = dataclasses.replace(inputs, logits=logits.requires_grad_())
        contenders[name] = _mixture(config, own)
        moved[name] = bytes_moved(config, shape, options.weighted)
    report.say(f"compiling baselines for {shape}")
    fixed = swiglu.activations(inputs.preact, inputs.weight, config.gated)
    base = [t for t in (inputs.preact, inputs.weight) if t is not None]
    for name, function in fixed.items():
        run_fixed = functools.partial(function, inputs.preact, inputs.weight)
        contenders[name] = Contender(run_fixed, base, inputs.grad)
    used = {name: memory(each, device) for name, each in contenders.items()}
    half = max(each["backward"] for each in moved.values()) // 2
    source, target = (torch.zeros(half, dtype=torch.uint8, device=device) for _ in range(2))
    for name, each in moved.items():
        for pass_, size in each.items():
            contenders[f"copy {name} {pass_}"] = _copy(source[: size // 2], target[: size // 2])
    report.say(f"timing {shape}")
    times = race(contenders, options.repeats, clock)
    best = fastest(times, fixed)
    return [
        {
            "variant": name,
            **dataclasses.asdict(shape),
            "weighted": options.weighted,
            "backend": op.resolve_backend(config.backend, device.type, report.DTYPES[shape.dtype]),
            **times[name].medians(),
            "best": best,
            "fixed": {each: times[each].medians() for each in fixed},
            "ratio": ratios(times[name], times[best]),
            **_bandwidth(name, times, moved[name]),
            "memory": {each: used[each] for each in (name, *fixed)},
            "device": device.type,
        }
        for name, config in configs.items()
    ]


def _mixture(config: MoAConfig, inputs: Inputs) -> Contender:
    return Contender(
        lambda: op.mixture(inputs.preact, inputs.logits, config, inputs.weight),
        inputs.differentiable,
        inputs.grad,
    )


def _copy(source: Tensor, target: Tensor) -> Contender:
    """Reads half of the bytes and writes the other half."""
    return Contender(lambda: target.copy_(source))


def _bandwidth(name: str, times: dict[str, Times], moved: dict[str, int]) -> dict[str, Any]:
    """Bytes, GB/s of the pass, and its share of the bandwidth of a copy in the same round."""
    rates, shares = {}, {}
    for pass_, size in moved.items():
        taken: list[float] = getattr(times[name], pass_)
        shares[pass_] = ratio(times[f"copy {name} {pass_}"].forward, taken)
        rates[pass_] = size / statistics.median(taken) / 1e6
    return {"bytes": moved, "gb_per_s": rates, "copy_share": shares}


def verdict(row: dict[str, Any]) -> str:
    """Whether the row meets the project's targets; '-' where it has none."""
    device, variant = row["device"], row["variant"]
    limit = TIME_TARGETS[device].get(variant)
    if limit is None:
        return "-"
    found = row["ratio"]["both"]["median"]
    missed = [f"{found:.2f} > {limit:.2f}"] if found > limit else []
    for pass_, least in COPY_TARGETS[device].items():
        share = row["copy_share"][pass_]["median"]
        if share < least:
            missed.append(f"{pass_} {share:.0%} < {least:.0%}")
    return "missed: " + ", ".join(missed) if missed else f"met (<= {limit:.2f})"


def _line(row: dict[str, Any]) -> str:
    row["target"] = verdict(row)
    spread = row["ratio"]["both"]
    kind = "peak_bytes" if row["device"] == "cuda" else "saved_bytes"
    used = [row["memory"][name][kind] / 2**20 for name in (row["variant"], row["best"])]
    return _FORM.format(
        *(row[key] for key in ("variant", "dtype", "rows", "width")),
        *(f"{row[f'{name}_ms']:.3f}" for name in ("forward", "backward")),
        *(f"{row['ratio'][name]['median']:.2f}" for name in ("forward", "backward", "both")),
        f"({spread['min']:.2f}-{spread['max']:.2f})",
        *(f"{row['copy_share'][name]['median']:.0%}" for name in ("forward", "backward")),
        *(f"{each:.1f}" for each in used),
        row["target"],
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Time over the best fixed activation, one group of bars per configuration."""
    rows = result["results"]
    limits = [TIME_TARGETS[row["device"]].get(row["variant"], float("nan")) for row in rows]
    report.draw_bars(
        [f"{r['variant']} {r['dtype']}\n{r['rows']}x{r['width']}" for r in rows],
        {p: [r["ratio"][p]["median"] for r in rows] for p in ("forward", "backward", "both")},
        "time over the best SwiGLU's",
        f"the mixture alone, {rows[0]['device']}",
        path,
        marks={"target, both": limits},
    )
