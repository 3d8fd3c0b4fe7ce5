#!/usr/bin/env python3
"""Compares runs: final validation loss against the baseline, as a table and a picture.

    tools/compare_runs.py runs/base runs/bi runs/qd --out runs/compare
    tools/compare_runs.py --train tiny-moe --seeds 1 2 3 --out runs/compare

With --train it first trains baseline, LA, one, bi and qd of a recipe, every variant from the same
seeds and data; runs that are already finished in --out are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moa_megatron import telemetry  # noqa: E402
from moa_megatron.runstate import REFUSED, read_status  # noqa: E402

VARIANTS: dict[str, list[str]] = {
    "baseline": ["--moa-mixing", "fixed"],
    "LA bi": ["--moa-mixing", "la", "--moa-variant", "bi"],
    "MoA one": ["--moa-mixing", "moa", "--moa-variant", "one"],
    "MoA bi": ["--moa-mixing", "moa", "--moa-variant", "bi"],
    "MoA qd": ["--moa-mixing", "moa", "--moa-variant", "qd"],
}


class RunFailed(Exception):
    """A run that did not finish, with its exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Result:
    """One finished run."""

    variant: str
    seed: int
    loss: float
    folder: Path
    unit: str = telemetry.NATS


def main() -> int:
    """Prints the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="run folders; the first is the baseline")
    parser.add_argument("--train", metavar="RECIPE", help="train the variants of this recipe first")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234], help="default: 1234")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="table and picture")
    parser.add_argument("--flags", default="", help="flags for every run, such as '--lr 2e-3'")
    options = parser.parse_args()
    if bool(options.runs) == bool(options.train):
        sys.stderr.write("refused: give run folders, or --train RECIPE\n")
        return REFUSED
    try:
        results = _trained(options) if options.train else [_read(path) for path in options.runs]
    except RunFailed as error:
        sys.stderr.write(f"run failed with exit code {error.code}: {error}\n")
        return error.code
    except ValueError as error:
        sys.stderr.write(f"refused: {error}\n")
        return REFUSED
    options.out.mkdir(parents=True, exist_ok=True)
    table = summarize(results)
    unit = results[0].unit
    text = markdown(table, unit)
    print(text)
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    picture = options.out / "curves.png"
    title = f"{options.train or 'runs'}: validation loss, mean of {table[0]['seeds']} seed(s)"
    telemetry.draw_losses(mean_curves(results), title, picture, telemetry.VALID_LOSS, unit)
    print(f"\ntable {options.out / 'table.md'}\npicture {picture}")
    print(json.dumps({"results": table}))
    return 0


def _trained(options: argparse.Namespace) -> list[Result]:
    launcher = Path(__file__).resolve().parents[1] / "launch" / "local.sh"
    results = []
    jobs = [(name, seed) for seed in options.seeds for name in VARIANTS]
    for number, (name, seed) in enumerate(jobs, start=1):
        folder = options.out / f"{options.train}-{name.lower().replace(' ', '-')}-seed{seed}"
        flags = [*VARIANTS[name], "--seed", str(seed), *options.flags.split()]
        status = resumable(folder, [options.train, *flags])
        if status is None or status["state"] != "finished":
            print(f"[{number}/{len(jobs)}] {name}, seed {seed}", flush=True)
            command = [str(launcher), options.train, "--run-dir", str(folder), *flags]
            code = subprocess.run(command).returncode
            if code:
                raise RunFailed(code, f"{name}, seed {seed}: see {folder}")
        results.append(_read(folder, name, seed))
    return results


def resumable(folder: Path, words: list[str]) -> dict[str, Any] | None:
    """Status of an earlier run of the same command; another command's run is refused."""
    record = folder / "command.json"
    if record.exists() and json.loads(record.read_text()) != words:
        raise ValueError(f"{folder} holds a run of other settings; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(words))
    return read_status(folder)


def _read(folder: Path, variant: str | None = None, seed: int = 0) -> Result:
    status = read_status(folder)
    if status is None or status.get("validation_loss") is None:
        raise ValueError(f"{folder} holds no finished run with a validation loss (status.json)")
    unit = str(status.get("loss_unit") or telemetry.NATS)
    return Result(variant or folder.name, seed, float(status["validation_loss"]), folder, unit)


def summarize(results: list[Result]) -> list[dict[str, Any]]:
    """One row per variant: mean loss, and the paired difference to the first variant.

    Differences are taken seed by seed; ``error`` is the standard error of their mean, None for
    one seed.
    """
    base = {r.seed: r.loss for r in results if r.variant == results[0].variant}
    rows = []
    for name in dict.fromkeys(r.variant for r in results):
        runs = [r for r in results if r.variant == name]
        deltas = [r.loss - base[r.seed] for r in runs if r.seed in base]
        error = statistics.stdev(deltas) / len(deltas) ** 0.5 if len(deltas) > 1 else None
        rows.append(
            {
                "variant": name,
                "seeds": len(runs),
                "loss": statistics.fmean(r.loss for r in runs),
                "delta": statistics.fmean(deltas),
                "error": error,
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]], unit: str = telemetry.NATS) -> str:
    """The table for people."""
    loss = f"validation loss ({unit})"
    header = ("variant", "seeds", loss, "against the first", "standard error")
    cells = [
        (
            row["variant"],
            row["seeds"],
            f"{row['loss']:.4f}",
            f"{row['delta']:+.4f}",
            "" if row["error"] is None else f"{row['error']:.4f}",
        )
        for row in rows
    ]
    return telemetry.table(header, cells)


def mean_curves(results: Iterable[Result]) -> dict[str, dict[str, telemetry.Curve]]:
    """Validation curves averaged over the seeds of each variant, at steps that all of them have."""
    points: dict[str, list[dict[int, float]]] = {}
    for result in results:
        curves = telemetry.read_scalars(result.folder / "tensorboard", (telemetry.VALID_LOSS,))
        curve = curves.get(telemetry.VALID_LOSS, telemetry.Curve())
        points.setdefault(result.variant, []).append(dict(zip(curve.steps, curve.values)))
    averaged = {}
    for name, runs in points.items():
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        values = [statistics.fmean(run[step] for run in runs) for step in steps]
        averaged[name] = {telemetry.VALID_LOSS: telemetry.Curve(steps, values)}
    return averaged


if __name__ == "__main__":
    sys.exit(main())
