"""Options, environment, progress and chart of the benchmarks."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("type1", "one", "bi", "qd")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that ``--op`` and ``--layer`` share; their defaults depend on the device."""
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        default=["one", "bi", "qd"],
        help=f"of {', '.join(VARIANTS)}; default: one bi qd",
    )
    parser.add_argument("--dtype", nargs="+", metavar="NAME", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="tokens")
    parser.add_argument("--width", nargs="+", type=int, metavar="D", help="width of the FFN")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds; default: CUDA 30, CPU 7")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda where there")
    parser.add_argument(
        "--allocator",
        choices=("retained", "system"),
        default="retained",
        help="CPU; retained (default): freed memory stays, so no pass pays page faults for its "
        "results; system: malloc as it is",
    )
    parser.add_argument("--backend", default="auto", help="of the mixture; default: auto")


def settle(options: argparse.Namespace, defaults: dict[str, dict[str, Any]]) -> torch.device:
    """Checks the shared options, fills in the device's ``defaults``, returns the device.

    Raises:
        ValueError: for a value that is not among the choices or not positive.
    """
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    known("device", [options.device], ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
    chosen = {"repeats": {"cuda": 30, "cpu": 7}[options.device], **defaults[options.device]}
    for name, value in chosen.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    known("variants", options.variants, VARIANTS)
    known("dtype", options.dtype, DTYPES)
    for name in ("rows", "width", "repeats", "threads"):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: must be positive")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda":
        options.allocator = "torch"
    elif options.allocator == "retained" and not _retain_memory():
        options.allocator = "system"
    return torch.device(options.device)


def conditions(options: argparse.Namespace, timing: str) -> dict[str, Any]:
    """How the numbers were taken, for the JSON object."""
    return {"timing": timing, "repeats": options.repeats, "allocator": options.allocator}


def heading(options: argparse.Namespace, timing: str) -> str:
    """The same for people."""
    text = f"times: {timing}; medians of {options.repeats} rounds in turn"
    return f"{text}; allocator: {options.allocator}"


def _retain_memory() -> bool:
    """Makes glibc's malloc serve large tensors from a heap that it never gives back.

    By default it maps and unmaps each of them, and every page costs a fault on its first write:
    often more time than the op, and alike for all contenders. False where malloc is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def known(name: str, values: Iterable[str], choices: Iterable[str]) -> None:
    """Raises ValueError, naming option, value and choices, for a value not among them."""
    for value in values:
        if value not in choices:
            raise ValueError(f"--{name} {value!r} is unknown: choose from {', '.join(choices)}")


def say(text: str) -> None:
    """Progress, on stderr: stdout holds the report."""
    print(text, file=sys.stderr, flush=True)


def draw_bars(
    groups: Sequence[str],
    series: dict[str, Sequence[float]],
    label: str,
    title: str,
    path: Path,
    stacked: bool = False,
    marks: dict[str, Sequence[float]] | None = None,
) -> None:
    """Bars per group, side by side or stacked; ``marks`` are short lines across a group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(max(6.0, 0.9 * len(groups)), 4.5), dpi=130)
    width, bottom = (0.7 if stacked else 0.8 / len(series)), [0.0] * len(groups)
    for index, (name, values) in enumerate(series.items()):
        shift = 0.0 if stacked else (index - (len(series) - 1) / 2) * width
        places = [place + shift for place in range(len(groups))]
        axes.bar(places, values, width, bottom=bottom if stacked else None, label=name)
        bottom = [a + b for a, b in zip(bottom, values)]
    for name, values in (marks or {}).items():
        starts = [place - 0.45 for place in range(len(groups))]
        axes.hlines(values, starts, [s + 0.9 for s in starts], colors="k", label=name)
    axes.set_xticks(range(len(groups)), groups, rotation=40, ha="right", fontsize=7)
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def environment() -> dict[str, Any]:
    """Machine, versions and commit that a number needs to be quoted."""
    compiler = _line(os.environ.get("CXX", "g++"), "--version")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "megatron_core": _version("megatron-core"),
        "compiler": compiler,
        "commit": _line("git", "rev-parse", "--short", "HEAD") or "unknown",
        "modified": bool(_line("git", "status", "--porcelain", "--untracked-files=no")),
    }


def _line(*command: str) -> str | None:
    """First line that a command prints, None where it cannot run or prints nothing."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = re.findall(r"model name\s*:\s*(.+)", text)
    return f"{len(names)} x {names[0]}" if names else platform.processor()
