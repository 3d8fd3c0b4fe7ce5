#!/usr/bin/env python3
"""Reports a sweep: every point's loss as a table and a picture, and which points to run again.

    tools/report_sweep.py runs/lr-sweep

Writes sweep.md, sweep.csv and sweep.png into the sweep's folder. The picture shows the loss curves
and the final loss against the swept value, or bars where that is no number. Exit code 0 if every
point has finished, 1 if one has not, 78 for a folder that is no sweep.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moa_megatron import runstate, telemetry  # noqa: E402

_TITLE_WIDTH = 70
_ERROR_WIDTH = 100  # in the table; sweep.csv has all of it
_LOSSES = {"loss": "training loss", "validation_loss": "validation loss"}


@dataclass(frozen=True)
class Point:
    """One point of the sweep, with the little or much that its run has left."""

    index: int
    name: str
    settings: dict[str, str]
    folder: Path
    status: dict[str, Any]

    @property
    def state(self) -> str:
        return str(self.status.get("state", "missing"))

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    @property
    def error(self) -> str:
        """Why it has not finished, in one line, as far as the run has said."""
        if self.finished:
            return ""
        said = self.status.get("error") or self.status.get("decision") or ""
        rank = f"rank {self.status['rank']}: " if said and "rank" in self.status else ""
        return rank + _one_line(said)

    def loss(self, kind: str) -> str:
        """As the run left it, be it of an unfinished run or infinite."""
        value = self.status.get(kind)
        return f"{value:.4f}" if isinstance(value, float) else ""

    def result(self, kind: str) -> float | None:
        """What may be held against other points: the finite loss of a finished run."""
        return _number(self.status.get(kind)) if self.finished else None

    def result_or_reason(self, kind: str) -> float | str:
        """The result, or in words why there is none."""
        result = self.result(kind)
        if result is not None:
            return result
        return "no finite loss" if self.finished else self.state


@dataclass(frozen=True)
class Sweep:
    """A sweep's points and what was swept."""

    title: str
    points: list[Point]

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for point in self.points for key in point.settings))

    @property
    def kind(self) -> str:
        """The loss that points are compared by: training loss where nobody validated."""
        validated = any(point.result("validation_loss") is not None for point in self.points)
        return "validation_loss" if validated else "loss"

    @property
    def best(self) -> Point | None:
        results = [(p.result(self.kind), p) for p in self.points]
        compared = [(loss, p) for loss, p in results if loss is not None]
        return min(compared, key=lambda pair: pair[0])[1] if compared else None

    @property
    def scale(self) -> str | None:
        """The swept key whose numbers make an axis; None where there is none."""
        if len(self.keys) > 2:
            return None
        for key in self.keys:
            if all(_number(point.settings.get(key)) is not None for point in self.points):
                return key
        return None


def main() -> int:
    """Prints and writes the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, help="folder that holds sweep.json")
    folder: Path = parser.parse_args().sweep
    try:
        sweep = read_sweep(folder)
    except ValueError as error:
        sys.stderr.write(f"refused: {error}\n")
        return runstate.REFUSED
    text = markdown(sweep)
    page = f"# {sweep.title}\n\n{text}\n\n![loss of all points](sweep.png)\n"
    try:
        (folder / "sweep.md").write_text(page, encoding="utf-8")
        write_csv(sweep, folder / "sweep.csv")
        draw(sweep, folder / "sweep.png")
    except OSError as error:
        sys.stderr.write(f"cannot write the report into {folder}: {error}\n")
        return runstate.STORAGE if runstate.is_storage_error(error) else runstate.REFUSED
    print(f"{text}\n")
    for name in ("sweep.md", "sweep.csv", "sweep.png"):
        print(f"wrote {folder / name}")
    return _verdict(sweep, folder)


def read_sweep(folder: Path) -> Sweep:
    """The sweep in ``folder``, with the status of every point.

    Raises:
        ValueError: the folder holds no ``sweep.json``, or one that describes no points.
    """
    path = folder / "sweep.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): give the folder of a sweep, which "
            "launch/submit.py names when it submits one"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): submit the sweep again") from error
    try:
        points = [_point(folder, entry) for entry in record["points"]]
        title = " ".join([str(record["recipe"]), *map(str, record.get("flags", []))])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} describes no sweep ({type(error).__name__}: {error}): it needs recipe and "
            "points, each with index, name, settings and run_dir; submit the sweep again"
        ) from error
    names = [point.name for point in points]
    if not points or len(set(names)) < len(names):
        raise ValueError(
            f"{path} has {len(points)} points with {len(set(names))} different names: it needs "
            "one or more, each with a name of its own; submit the sweep again"
        )
    return Sweep(title, points)


def _point(folder: Path, entry: dict[str, Any]) -> Point:
    run = folder / entry["run_dir"]
    settings = {str(key): str(value) for key, value in entry["settings"].items()}
    status = runstate.read_status(run)
    if status is None:
        written = (run / "status.json").exists()
        what = "cannot be read as JSON" if written else "is absent: it never started"
        status = {
            "state": "unreadable" if written else "missing",
            "error": f"{run / 'status.json'} {what}",
        }
    return Point(int(entry["index"]), _one_line(entry["name"]), settings, run, status)


def markdown(sweep: Sweep) -> str:
    """The table for people."""
    header = ("point", "state", "exit code", "step", *_LOSSES.values(), "", "error")
    rows = []
    for point in sweep.points:
        step, steps = point.status.get("step"), point.status.get("train_iters")
        cells = (
            point.name,
            point.state,
            point.status.get("exit_code"),
            step if steps is None else f"{step} of {steps}",
            *(point.loss(kind) for kind in _LOSSES),
            "best" if point is sweep.best else None,
            _short(point.error, _ERROR_WIDTH),
        )
        rows.append(["" if cell is None else cell for cell in cells])
    return telemetry.table(header, rows)


def write_csv(sweep: Sweep, path: Path) -> None:
    """All points with all that is known of them, for other programs."""
    facts = ("exit_code", "step", "train_iters", *_LOSSES, "test_loss")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "point", *sweep.keys, "state", *facts, "best", "error", "folder"])
        for point in sweep.points:
            settings = [point.settings.get(key) for key in sweep.keys]
            known = [point.status.get(fact) for fact in facts]
            best = int(point is sweep.best)
            row = [*settings, point.state, *known, best, point.error, point.folder]
            writer.writerow([point.index, point.name, *row])


def draw(sweep: Sweep, path: Path) -> None:
    """Loss curves of all points on the left, their results on the right."""
    scale, points = sweep.scale, sweep.points
    if scale is not None:
        points = sorted(points, key=lambda point: float(point.settings[scale]))
    with telemetry.picture(path, columns=2) as (left, right):
        curves = {_label(point): _curves(point) for point in points}
        units = (point.status.get("loss_unit") for point in points)
        unit = next((str(unit) for unit in units if unit), telemetry.NATS)
        telemetry.plot_losses(left, curves, in_order=scale is not None, unit=unit)
        left.set_title(_short(sweep.title, _TITLE_WIDTH))
        loss = f"final {_LOSSES[sweep.kind]} ({unit})"
        if scale is None:
            results = {p.name: p.result_or_reason(sweep.kind) for p in points}
            telemetry.plot_bars(right, results)
            right.set_xlabel(loss)
        else:
            ticks = {float(p.settings[scale]): p.settings[scale] for p in points}
            telemetry.plot_results(right, _lines(sweep, scale), ticks)
            right.set_xlabel(scale)
            right.set_ylabel(loss)
        verdict = f"best: {sweep.best.name}" if sweep.best else "no results yet"
        right.set_title(_short(verdict, _TITLE_WIDTH))


def _lines(sweep: Sweep, scale: str) -> dict[str, list[tuple[float, float | None]]]:
    """One line, or one for each value of a second key."""
    lines: dict[str, list[tuple[float, float | None]]] = {}
    for point in sweep.points:
        name = ", ".join(f"{k}={v}" for k, v in point.settings.items() if k != scale)
        pair = (float(point.settings[scale]), point.result(sweep.kind))
        lines.setdefault(name, []).append(pair)
    return lines


def _label(point: Point) -> str:
    return point.name if point.finished else f"{point.name} ({point.state})"


def _curves(point: Point) -> dict[str, telemetry.Curve]:
    folder = point.folder / "tensorboard"
    if not folder.is_dir():
        folder = Path(str(point.status.get("tensorboard", folder)))
    return telemetry.read_run(folder, tested="test_loss" in point.status)


def _verdict(sweep: Sweep, folder: Path) -> int:
    """Says which points have finished and what to do about the others; the exit code."""
    unfinished = [point for point in sweep.points if not point.finished]
    count = len(sweep.points)
    print(f"\n{count - len(unfinished)} of {count} points finished")
    if sweep.best is not None:
        loss = sweep.best.result(sweep.kind)
        print(f"  best: {sweep.best.name}, {_LOSSES[sweep.kind]} {loss:.4f}")
    if not unfinished:
        return runstate.FINISHED
    for state in dict.fromkeys(point.state for point in unfinished):
        names = ", ".join(point.name for point in unfinished if point.state == state)
        print(f"  {state}: {names}")
    print(f"run them alone again: ./launch/submit.py --rerun {shlex.quote(str(folder))}")
    return runstate.FAILED


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _number(value: object) -> float | None:
    """A finite number, or None; the text of a setting counts, a truth value does not."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


if __name__ == "__main__":
    sys.exit(main())
