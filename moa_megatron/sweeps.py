"""Points of a sweep: every combination of the swept values, each a run of its own.

Standard library only: a login node makes them, each element of the Slurm array reads its own.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any


def make_points(sweeps: list[str]) -> list[dict[str, Any]]:
    """``["lr=6e-4,1e-3", "seed=1,2"]`` -> points with index, name, settings and run_dir.

    Raises:
        ValueError: for anything that is not KEY=VALUE,VALUE,..., and for points that are not apart.
    """
    axes = []
    for text in sweeps:
        key, separator, values = text.partition("=")
        choices = [value for value in values.split(",") if value]
        if not key or not separator or not choices:
            raise ValueError(
                f"--array-sweep {text}: write it as KEY=VALUE,VALUE, such as lr=6e-4,1e-3,2e-3"
            )
        if len(set(choices)) < len(choices):
            raise ValueError(f"--array-sweep {text}: a value is there twice")
        axes.append([(key.replace("-", "_"), value) for value in choices])
    keys = [axis[0][0] for axis in axes]
    if len(set(keys)) < len(keys):
        raise ValueError(f"--array-sweep names {', '.join(keys)}: each key once, with all values")
    points: list[dict[str, Any]] = []
    for index, combination in enumerate(itertools.product(*axes) if axes else ()):
        name = ",".join(f"{key}={value}" for key, value in combination)
        folder = re.sub(r"[^\w.=,+-]", "_", name)
        if any(point["run_dir"] == folder for point in points):
            raise ValueError(f"--array-sweep: several points would share the folder {folder}")
        settings = dict(combination)
        points.append({"index": index, "name": name, "settings": settings, "run_dir": folder})
    return points


def read_point(sweep: Path, index: int) -> dict[str, Any]:
    """One point of the sweep in a folder, as ``sweep.json`` has it."""
    points = json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))["points"]
    return next(point for point in points if point["index"] == index)
