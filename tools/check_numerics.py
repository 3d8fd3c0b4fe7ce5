#!/usr/bin/env python3
"""Does a recipe train alike in other number formats, on other modules, with recomputation?

Trains it once for each way ("side"), from the same seed and data, and compares the training loss at
the end, the mean over the last tenth of the steps: bf16 with fp32, FP8 and the others with bf16.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moa_megatron import packages, recipes, telemetry  # noqa: E402
from moa_megatron.runstate import REFUSED  # noqa: E402
from tools.benchmarks import runs  # noqa: E402
from tools.benchmarks.sides import OTHER, SIDES, closed, lacks, suited  # noqa: E402
from tools.compare_runs import resumable  # noqa: E402

_EXAMPLES = """
examples:
  tools/check_numerics.py tiny-moe                       all that this machine can run
  tools/check_numerics.py tiny-moe --sides bf16 grouped recompute-moe --jobs 2
  tools/check_numerics.py dense-0.5b --sides fp8-blockwise --steps 500 --flags='--mock-data'

exit code: 0 within the bounds, 1 outside one, nothing to compare or a run failed, 78 refused,
143 stopped: the table has the sides that were finished
"""
_TAIL = 15  # lines of a failed run's log
_UNFINISHED: dict[str, Any] = {
    **dict.fromkeys(("loss", "code", "step_ms", "peak_bytes")),
    **{"curve": telemetry.Curve(), "problem": ""},
}


def main(words: list[str] | None = None) -> int:
    """Prints the comparison; returns the exit code."""
    try:
        options = _parser().parse_args(words)
        for name in ("steps", "jobs"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} {getattr(options, name)}: must be positive")
        values = recipes.load(options.recipe)
        sides = _sides(options.sides, bool(values.get("num_experts")))
        options.out = options.out.resolve()  # runs start in the project's folder
        if any("--fp8-format" in SIDES[name].flags for name in sides):
            options.flags = f"--moa-align 64 {options.flags}"
            print("with FP8 among the sides, all have --moa-align 64")
        kept = {name: _kept(options, name) for name in sides}  # before any is trained
    except ValueError as error:
        sys.stderr.write(f"refused: {error}\n")
        return REFUSED
    print(f"{len(sides)} runs of {options.recipe}, {options.steps} steps each: {', '.join(sides)}")
    found: dict[str, dict[str, Any]] = dict.fromkeys(sides, _UNFINISHED)
    try:
        _train(options, kept, found)
    finally:  # Ctrl-C and SIGTERM, too
        rows = _report(options, found)
    return int(not passed(rows))


def _report(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints and writes what the sides came to; returns the rows of the table."""
    rows = _tabulate(options, found)
    print(f"\n{markdown(rows)}", flush=True)
    curves = {name: {telemetry.TRAIN_LOSS: each["curve"]} for name, each in found.items()}
    picture = options.out / "curves.png"
    title = f"{options.recipe}: training loss"
    trained = {name: curve for name, curve in curves.items() if found[name]["loss"] is not None}
    telemetry.draw_losses(trained, title, picture, telemetry.TRAIN_LOSS)
    print(f"\ntable {options.out / 'table.md'}\npicture {picture}")
    line = json.dumps({"recipe": options.recipe, "steps": options.steps, "sides": rows})
    (options.out / "numerics.json").write_text(line + "\n", encoding="utf-8")
    print(line)
    return rows


def _tabulate(
    options: argparse.Namespace, found: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    rows = judge(found, set(options.sides or ()))
    (options.out / "table.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = recipes.Parser(  # refuses with 78
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a name from launch/recipes, or a .yaml file")
    parser.add_argument(
        "--sides",
        nargs="+",
        metavar="SIDE",
        help=f"of {', '.join(SIDES)}; default: those that this machine can run",
    )
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    parser.add_argument("--seed", type=int, default=1234, help="default: 1234")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default: 1")
    parser.add_argument("--flags", default="", help="for every run, such as '--lr 2e-3'")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/numerics"),
        help="table and picture; default: %(default)s",
    )
    return parser


def _sides(asked: list[str] | None, experts: bool) -> list[str]:
    """The sides to run, with those that they are held against.

    Raises:
        ValueError: for a name that is none, or needs what is not there.
    """
    unknown = [name for name in asked or () if name not in SIDES]
    if unknown:
        raise ValueError(f"--sides {unknown[0]}: no such side; choose from {', '.join(SIDES)}")
    have = available()
    for name in asked or ():
        missing = lacks(name, experts, have)
        if missing:
            raise ValueError(f"--sides {name}: needs {', '.join(missing)}")
    return closed(asked or suited(experts, have))


def available() -> frozenset[str]:
    """What sides may need and this machine has."""
    import torch

    from tools.benchmarks import grouped

    have = {"engine"} if grouped.has_engine() else set()
    if have and "mxfp8" in grouped.recipes():
        have.add("mxfp8")
    if torch.cuda.is_available() and packages.importable("fused_weight_gradient_mlp_cuda"):
        have.add("apex")
    return frozenset(have)


def _train(
    options: argparse.Namespace, kept: dict[str, bool], found: dict[str, dict[str, Any]]
) -> None:
    """Puts what every side came to into ``found``, and into the table, as they finish."""
    runs.end_with_tool()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        waiting = {pool.submit(_side, options, name, kept[name]): name for name in kept}
        try:
            for number, done in enumerate(concurrent.futures.as_completed(waiting), start=1):
                name, each = waiting[done], done.result()
                found[name] = each
                said = each["problem"] or f"loss {each['loss']:.4f}"
                said = f"kept from before, {said}" if kept[name] else said
                print(f"[{number}/{len(kept)}] {name}: {said}", flush=True)
                _tabulate(options, found)
        except BaseException:  # Ctrl-C and SIGTERM, too: no run is left behind
            pool.shutdown(wait=False, cancel_futures=True)
            runs.end_all()
            raise


def _flags(options: argparse.Namespace, name: str) -> list[str]:
    flags = [*SIDES[name].flags, *options.flags.split()]
    flags += ["--train-iters", str(options.steps), "--seed", str(options.seed)]
    flags += ["--tensorboard-log-interval", "1", "--set", "save=null"]
    return flags


def _kept(options: argparse.Namespace, name: str) -> bool:
    """Whether a run of the same words has finished; raises ValueError where there is another's."""
    status = resumable(options.out / name, [options.recipe, *_flags(options, name)])
    finished = status is not None and status["state"] == "finished"
    return finished and (options.out / f"{name}.log").exists()


def _side(options: argparse.Namespace, name: str, kept: bool) -> dict[str, Any]:
    """Loss, curve and memory of one side; trained earlier, or now."""
    folder, log = options.out / name, options.out / f"{name}.log"
    if kept:
        run = runs.Run(0, log.read_text(encoding="utf-8"))
    else:
        run = runs.train(options.recipe, folder, _flags(options, name), log=log)
    facts: dict[str, Any] = {"peak_bytes": run.peak_bytes, "code": run.code}
    facts["step_ms"] = run.step_ms if options.jobs == 1 else None  # runs beside it slow it down
    if run.code:
        tail = "\n".join(run.output.splitlines()[-_TAIL:])
        problem = f"refused: {run.refusal}" if run.code == REFUSED else f"failed, {log}:\n{tail}"
        return {**facts, "loss": None, "curve": telemetry.Curve(), "problem": problem}
    scalars = telemetry.read_scalars(folder / "tensorboard", (telemetry.TRAIN_LOSS,))
    curve = scalars.get(telemetry.TRAIN_LOSS, telemetry.Curve())
    if len(curve.values) < options.steps:
        problem = f"failed: {len(curve.values)} of {options.steps} steps have a loss, see {folder}"
        return {**facts, "loss": None, "curve": curve, "problem": problem}
    last = curve.values[-max(1, options.steps // 10) :]
    return {**facts, "loss": statistics.fmean(last), "curve": curve, "problem": ""}


def judge(found: dict[str, dict[str, Any]], asked: set[str]) -> list[dict[str, Any]]:
    """One row per side: its loss, the difference to its reference in units of it, a verdict.

    Verdicts: reference, within, chance (outside its bound, but within twice what the twin differs
    by and twice the widest bound), outside, unfinished, failed, refused (failed for a side that was
    asked for); a side shares the lot of its reference where that has no loss.
    """
    rows: list[dict[str, Any]] = []
    twins = _twins(found)
    for name, each in found.items():
        side, difference = SIDES[name], None
        base = found[side.against]["loss"] if side.against else None
        if each["code"] is None:
            verdict = "unfinished"
        elif each["loss"] is None:
            refused = each["code"] == REFUSED and name not in asked
            verdict = "refused" if refused else "failed"
        elif side.against is None:
            verdict = "reference"
        elif base is None:
            verdict = next(row["verdict"] for row in rows if row["side"] == side.against)
        else:
            difference = each["loss"] / base - 1.0
            # NaN is outside.
            chance = abs(difference) <= 2.0 * min(twins, OTHER)
            verdict = "chance" if chance else "outside"
            verdict = "within" if abs(difference) <= side.bound else verdict
        rows.append(
            {
                "side": name,
                "against": side.against,
                "loss": each["loss"],
                "difference": difference,
                "bound": side.bound if side.against else None,
                "verdict": verdict,
                "step_ms": each["step_ms"],
                "peak_bytes": each["peak_bytes"],
                "problem": each["problem"].splitlines()[0] if each["problem"] else "",
            }
        )
    return rows


def _twins(found: dict[str, dict[str, Any]]) -> float:
    """Relative difference of the twin's loss; 0 where there is none."""
    losses = [found[name]["loss"] for name in ("twin", "bf16") if name in found]
    if len(losses) < 2 or None in losses or not math.isfinite(losses[0]):
        return 0.0
    return abs(losses[0] / losses[1] - 1.0)


def passed(rows: list[dict[str, Any]]) -> bool:
    """No side is outside, failed or unfinished, and where sides are compared, one was."""
    verdicts = {row["verdict"] for row in rows}
    compared = any(row["against"] for row in rows)
    wanted = {"within", "chance"} if compared else {"reference"}
    return not verdicts & {"outside", "failed", "unfinished"} and bool(verdicts & wanted)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for people."""
    header = ("side", "against", "loss", "difference", "bound", "verdict", "peak GiB", "")
    cells = [
        (
            row["side"],
            row["against"] or "",
            "" if row["loss"] is None else f"{row['loss']:.4f}",
            "" if row["difference"] is None else f"{row['difference']:+.3%}",
            "" if row["bound"] is None else f"{row['bound']:.1%}",
            row["verdict"],
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}",
            row["problem"],
        )
        for row in rows
    ]
    return telemetry.table(header, cells)


if __name__ == "__main__":
    sys.exit(main())
