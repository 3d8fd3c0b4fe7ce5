"""The report as one JSON object; text and page only lay it out. Times are ns unless named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moa_megatron.profiling import RANGES
from tools.nsight.attribution import attribute
from tools.nsight.capture import Activity, Capture, read
from tools.nsight.classes import COLOURS, MOA
from tools.nsight.steps import Rank, ranks_of, summary
from tools.nsight.survey import survey

_Piece = tuple[Activity, float]
SCHEMA = 1
TOP_KERNELS = 15


def build(files: Sequence[Path]) -> tuple[dict[str, Any], list[Rank]]:
    """The report on exports of one run, and the ranks behind it.

    Args:
        files: SQLite exports. One that cannot be read becomes a warning while others can.

    Raises:
        ValueError: where no file can be read, with the reason for each.
    """
    captures, failures = [], []
    for file in files:
        try:
            captures.append(read(file))
        except ValueError as error:
            failures.append(str(error))
    if not captures:
        raise ValueError("\n".join(failures))
    for capture in captures:
        attribute(capture)
    ranks = [rank for capture in captures for rank in ranks_of(capture)]
    warnings = [f"left out: {failure}" for failure in failures]
    for capture in captures:
        several = len(captures) > 1
        prefix = f"{capture.file.name}: " if several else ""
        warnings += [prefix + text for text in capture.warnings]
    for rank in ranks:
        prefix = f"{rank.name}: " if len(ranks) > 1 else ""
        warnings += [prefix + text for text in _window_warnings(rank)]
    report = {
        "schema": SCHEMA,
        "files": [_file(capture) for capture in captures],
        "warnings": warnings,
        "ranks": [_rank(rank) for rank in ranks],
        "survey": survey(ranks),
    }
    return report, ranks


def _file(capture: Capture) -> dict[str, Any]:
    return {
        "file": str(capture.file),
        "nsys": capture.version,
        "host": capture.host,
        "session_start": capture.epoch,
        "gpus": sorted({name for name in capture.gpus.values() if name}),
    }


def _window_warnings(rank: Rank) -> list[str]:
    if rank.source != "NVTX":
        return [
            "no step markers (train.step N, ProfilerStep#N): the whole capture stands for one step"
        ]
    if len(rank.steps) == 1:
        return [
            "one step only: it holds the profiler's start-up; widen --profile-step-start/-end to "
            "three steps or more"
        ]
    return []


def _rank(rank: Rank) -> dict[str, Any]:
    pieces, steps = _pieces(rank), len(rank.counted)
    table = summary(rank.counted)
    excluded = [step.label for step in rank.steps if not step.counted]
    return {
        "rank": rank.name,
        "gpu": rank.capture.gpus.get(rank.device, ""),
        "steps": {
            "source": rank.source,
            "n": steps,
            "excluded": excluded,
            "rows": [
                {"step": s.label, "counted": s.counted, "start": s.window[0]} | s.metrics
                for s in rank.steps
            ],
            "summary": table,
        },
        "classes": _classes(pieces),
        "kernels": _kernels(pieces, steps),
        "moa": _moa(pieces),
        "ranges": _tree(pieces),
        "copies": _copies(pieces, steps),
        "ceiling": _ceiling(table),
        "coverage": _coverage(rank),
    }


def _pieces(rank: Rank) -> list[_Piece]:
    """Activities of the counted steps and their time inside of them, ns per step."""
    found = []
    for step in rank.counted:
        low, high = step.window
        for activity in rank.inside(step.window):
            time = min(activity.end, high) - max(activity.start, low)
            found.append((activity, time / len(rank.counted)))
    return found


def _classes(pieces: list[_Piece]) -> list[dict[str, Any]]:
    """Device time by class, summed over streams, with shares of that sum."""
    times: dict[str, float] = dict.fromkeys(COLOURS, 0.0)
    counts: dict[str, int] = dict.fromkeys(COLOURS, 0)
    for activity, time in pieces:
        times[activity.label] += time
        counts[activity.label] += 1
    whole = sum(times.values()) or 1.0
    return [
        {"class": name, "time": times[name], "share": times[name] / whole, "count": counts[name]}
        for name in COLOURS
        if counts[name]
    ]


def _kernels(pieces: list[_Piece], steps: int) -> list[dict[str, Any]]:
    """The kernels that take most, by short name and class."""
    times: dict[tuple[str, str], float] = defaultdict(float)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for activity, time in pieces:
        if activity.kind != "kernel":
            continue
        times[activity.name, activity.label] += time
        counts[activity.name, activity.label] += 1
    whole = sum(times.values()) or 1.0
    rows = [
        {
            "kernel": name,
            "class": label,
            "count": counts[name, label],
            "time": time,
            "mean": time * steps / counts[name, label],
            "share": time / whole,
        }
        for (name, label), time in times.items()
    ]
    return sorted(rows, key=lambda row: (-row["time"], row["kernel"]))[:TOP_KERNELS]


def _moa(pieces: list[_Piece]) -> dict[str, Any]:
    """Device time of the project's own ranges, forward and backward, without their inner ranges."""
    regions: dict[str, dict[str, float]] = {}
    kernels = share = 0.0
    for activity, time in pieces:
        if activity.kind == "kernel":
            kernels += time
            share += time if activity.label in MOA else 0.0
        ours = [name for name in activity.ranges if name in RANGES]
        if ours:
            row = regions.setdefault(ours[-1], {"forward": 0.0, "backward": 0.0})
            row["backward" if activity.backward else "forward"] += time
    ordered = {name: regions[name] for name in RANGES if name in regions}
    return {"share_of_kernel_time": share / kernels if kernels else 0.0, "regions": ordered}


def _tree(pieces: list[_Piece]) -> list[dict[str, Any]]:
    """Inclusive device time of every path of ranges, depth first, the longest first."""
    times: dict[tuple[str, ...], float] = defaultdict(float)
    counts: dict[tuple[str, ...], int] = defaultdict(int)
    for activity, time in pieces:
        path = (*activity.ranges, "(backward)") if activity.backward else activity.ranges
        for depth in range(1, len(path) + 1):
            times[path[:depth]] += time
            counts[path[:depth]] += 1

    def below(parent: tuple[str, ...]) -> list[dict[str, Any]]:
        children = [p for p in times if p[:-1] == parent]
        rows: list[dict[str, Any]] = []
        for path in sorted(children, key=lambda p: (-times[p], p)):
            rows.append({"path": list(path), "time": times[path], "count": counts[path]})
            rows += below(path)
        return rows

    return below(())


def _copies(pieces: list[_Piece], steps: int) -> list[dict[str, Any]]:
    """Copies by direction and memory (pinned or pageable), and fills; bytes per step."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for activity, time in pieces:
        if activity.kind not in ("memcpy", "memset"):
            continue
        row = rows.setdefault(
            (activity.name, activity.memory),
            {
                "kind": activity.name,
                "memory": activity.memory,
                "count": 0,
                "bytes": 0.0,
                "time": 0.0,
            },
        )
        row["count"] += 1
        row["bytes"] += activity.bytes / steps
        row["time"] += time
    return sorted(rows.values(), key=lambda row: -row["time"])


def _ceiling(table: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """Most that a step could gain: its median wall time over what would be left, minus 1.

    None where nothing would be left.
    """
    wall = table["wall"]["median"]

    def gain(removed: float) -> float | None:
        return wall / (wall - removed) - 1 if wall > removed else None

    return {
        "hide_exposed_communication": gain(table["exposed"]["median"]),
        "free_moa_kernels": gain(table["moa_alone"]["median"]),
        "never_starved": gain(table["starved"]["median"]),
    }


def _coverage(rank: Rank) -> dict[str, Any]:
    activities = rank.activities
    return {
        "activities": len(activities),
        "without_launch": sum(a.launch is None for a in activities),
        "without_range": sum(not a.ranges for a in activities),
        "streams": len({a.stream for a in activities}),
    }
