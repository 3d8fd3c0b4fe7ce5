"""Static report: what the Triton kernels' machine code does per element, and their error. No GPU.

``tools/bench.py --static`` runs it. Kernels are compiled ahead of time; their error comes from
Triton's interpreter, in a second process because it needs TRITON_INTERPRET=1 before the import.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moa_megatron.config import MoAConfig

Variant = Literal["type1", "one", "bi", "qd"]
Direction = Literal["forward", "backward"]
ROOT = Path(__file__).resolve().parents[2]
VARIANTS: tuple[Variant, ...] = ("type1", "one", "bi", "qd")
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
WIDTHS = (2048, 853, 3413)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Largest relative RMS error against the float64 reference. The interpreter truncates to bf16 where
# the GPU rounds to nearest, which doubles the error of a store: up to 2^-7 an element, 3e-3 to
# 5e-3 RMS. tests/kernels/test_aot.py holds that fact.
BOUNDS = {"bf16": 8e-3, "fp16": 1e-3, "fp32": 1e-5}
ERROR_ROWS, ERROR_WIDTHS = 5, (64, 19)  # both tile forms, and a row count that fills no program

HEADINGS = (
    *("variant", "pass", "D", "instr", "FP32", "special", "half", "loads", "stores", "regs"),
    *("spills", "total", "share", "bound"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", type=int, default=90, help="compute capability x 10; default: 90")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    parser.add_argument(
        "--variant", choices=VARIANTS, action="append", help="repeatable; default: all"
    )
    parser.add_argument(
        "--width", type=int, action="append", help="D, repeatable; default: 2048 853 3413"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the report and returns it.

    Raises:
        SystemExit: with exit code 1 and a message, if an error is out of bounds.
    """
    variants = tuple(options.variant or VARIANTS)
    bound = BOUNDS[options.dtype]
    errors = measured_errors(variants, options.dtype)
    if problems := out_of_bounds(errors, bound):
        raise SystemExit("\n  ".join(["no report, the kernels are wrong:", *problems]))
    result: dict[str, Any] = {
        "arch": options.arch,
        "dtype": options.dtype,
        "errors": errors,
        "error_bound": bound,
        "kernels": kernels(options, variants),
    }
    print("per element: instr, FP32, special, half rate in the loop; total with the row's start")
    print(
        "and end and idle lanes; share: of copy bandwidth on an H100, at most, and what bounds it"
    )
    for line in table(result["kernels"]):
        print(line)
    worst = max(max(each.values()) for each in errors.values())
    print(f"largest relative RMS error: {worst:.1e} (bound {bound:.0e})")
    return result


def kernels(options: argparse.Namespace, variants: tuple[Variant, ...]) -> list[dict[str, Any]]:
    """One entry per kernel compiled."""
    from moa_megatron.kernels import static

    rows = []
    for width in options.width or WIDTHS:
        for variant in variants:
            config = MoAConfig(variant=variant)
            for direction in DIRECTIONS:
                begin = time.perf_counter()
                compiled = static.compile_kernel(
                    direction, config, width, DTYPES[options.dtype], options.arch
                )
                counts = static.count(compiled)
                predicted = static.predict(counts, width=width)
                rows.append(
                    {"variant": variant, "direction": direction, "width": width}
                    | dataclasses.asdict(counts)
                    | {
                        "total": counts.per_row_total(width),
                        "bandwidth_share": predicted.bandwidth_share,
                        "bound": predicted.bound,
                        "seconds_per_element": predicted.seconds,
                        "addresses_are_64_bit": static.addresses_are_64_bit(compiled),
                    }
                )
                seconds = time.perf_counter() - begin
                print(f"{variant} {direction} D={width}: {seconds:.1f} s", file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    form = "{:<7} {:<8} {:>5} {:>6} {:>6} {:>7} {:>5} {:>6} {:>6} {:>5} {:>6} {:>6} {:>6}  {}"
    yield form.format(*HEADINGS)
    for row in rows:
        yield form.format(
            row["variant"],
            row["direction"],
            row["width"],
            f"{row['issued']:.1f}",
            f"{row['fp32']:.1f}",
            f"{row['special']:.1f}",
            f"{row['half_rate']:.1f}",
            _widths(row["loads"]),
            _widths(row["stores"]),
            row["registers"],
            row["spills"],
            f"{row['total']:.1f}",
            f"{row['bandwidth_share']:.0%}",
            row["bound"],
        )


def _widths(sizes: tuple[int, ...]) -> str:
    """Such as 2x16: two of 16 bytes a lane in one iteration."""
    return " ".join(f"{sizes.count(size)}x{size}" for size in sorted(set(sizes)))


def measured_errors(variants: tuple[Variant, ...], dtype: str) -> dict[str, dict[str, float]]:
    """Relative RMS errors of each variant's outputs and gradients, from Triton's interpreter.

    Raises:
        RuntimeError: with the interpreter's output, if it failed.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, __file__, dtype, *variants],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def out_of_bounds(errors: dict[str, dict[str, float]], bound: float) -> list[str]:
    return [
        f"{kernel}: relative RMS error of {name} {error:.1e}, bound {bound:.0e}"
        for kernel, each in errors.items()
        for name, error in each.items()
        if not error <= bound
    ]


def interpret(variant: Variant, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Errors of one shipped configuration; needs TRITON_INTERPRET=1."""
    from moa_megatron.kernels import triton_op
    from moa_megatron.reference import mixture_reference

    config = MoAConfig(variant=variant)
    generator = torch.Generator().manual_seed(0)

    def normal(columns: int) -> Tensor:
        return torch.randn(ERROR_ROWS, columns, generator=generator)

    preact = (2.0 * normal(width * (1 + config.gated))).to(dtype)
    coefficients, grad = normal(config.num_coefficients), normal(width).to(dtype)
    actual = [
        triton_op.forward(preact, coefficients, None, config),
        *triton_op.backward(grad, preact, coefficients, None, config)[:2],
    ]
    inputs = [each.double().requires_grad_() for each in (preact, coefficients)]
    hidden = mixture_reference(inputs[0], inputs[1], config, None)
    expected = [hidden, *torch.autograd.grad(hidden, inputs, grad.double())]
    names = ("hidden", "grad_preact", "grad_coefficients")
    return {
        name: ((one.double() - two).norm() / two.norm()).item()
        for name, one, two in zip(names, actual, expected, strict=True)
    }


def main(dtype: str, *variants: Variant) -> None:
    """The interpreter's process: errors of each variant at each width, as JSON."""
    print(
        json.dumps(
            {
                f"{variant} D={width}": interpret(variant, width, DTYPES[dtype])
                for variant in variants
                for width in ERROR_WIDTHS
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
