"""The report for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tools.nsight.steps import METRICS

# Smaller entries of the range tree are left out, not added to another.
TREE_SHARE, TREE_DEPTH = 0.005, 7
_IN_TABLE = ("wall", "busy", "idle", "compute", "communication", "exposed", "starved", "moa")


def render(report: dict[str, Any], unprofiled_ms: float | None = None) -> str:
    """All of the report as text; ``unprofiled_ms`` is a step's time without profiler."""
    lines = []
    for file in report["files"]:
        about = ", ".join(filter(None, [f"nsys {file['nsys']}", file["host"], *file["gpus"]]))
        lines.append(f"{file['file']} ({about})")
    lines += [f"warning: {text}" for text in report["warnings"]]
    for rank in report["ranks"]:
        lines += ["", *_rank(rank, unprofiled_ms)]
    if report["survey"]:
        lines += ["", *_survey(report["survey"])]
    return "\n".join(lines)


def ms(time: float) -> str:
    """Nanoseconds as milliseconds."""
    return f"{time / 1e6:,.3f}"


def percent(share: float | None) -> str:
    """A gain in percent."""
    return "unbounded" if share is None else f"{share:.1%}"


def excluded(steps: dict[str, Any]) -> str:
    """What the medians are made of, in words."""
    if steps["source"] != "NVTX":
        return "no step markers: the whole capture as one"
    left = f"; step {', '.join(steps['excluded'])} left out" if steps["excluded"] else ""
    why = " (the profiler starts up in it)" if steps["excluded"] else ""
    return f"{steps['n']} step(s) counted{left}{why}"


def ceiling(rank: dict[str, Any]) -> list[str]:
    """The most that each change could gain, as sentences."""
    gains = rank["ceiling"]
    return [
        f"if exposed communication were hidden: {percent(gains['hide_exposed_communication'])} "
        "faster",
        f"if MoA's kernels were free: {percent(gains['free_moa_kernels'])} faster",
        f"if the device never waited for a launch: {percent(gains['never_starved'])} faster",
    ]


def _rank(rank: dict[str, Any], unprofiled_ms: float | None) -> list[str]:
    steps, summary = rank["steps"], rank["steps"]["summary"]
    wall = summary["wall"]["median"]
    lines = [f"== {rank['rank']} {rank['gpu']}".rstrip(), excluded(steps)]
    if unprofiled_ms:
        lines.append(f"the profiled step takes {wall / 1e6 / unprofiled_ms:.2f} of the unprofiled")
    header = ("step", *_IN_TABLE)
    rows = [
        (row["step"] + ("" if row["counted"] else "*"), *(ms(row[name]) for name in _IN_TABLE))
        for row in steps["rows"]
    ]
    for key in ("min", "median", "max"):
        rows.append((key, *(ms(summary[name][key]) for name in _IN_TABLE)))
    shares = (f"{summary[n]['median'] / wall:.1%}" if wall else "" for n in _IN_TABLE)
    rows.append(("of wall", *shares))
    lines += ["", "steps, ms (unions of intervals)", *table(header, rows)]
    lines += [f"  {name}: {METRICS[name]}" for name in _IN_TABLE]
    lines += ["", "device time by class, ms per step, summed over streams"]
    lines += table(
        ("class", "time", "share", "count"),
        [(r["class"], ms(r["time"]), f"{r['share']:.1%}", r["count"]) for r in rank["classes"]],
    )
    lines += ["", "kernels, ms per step; mean in us"]
    lines += table(
        ("kernel", "class", "count", "time", "mean", "share"),
        [
            (short(r["kernel"]), r["class"], r["count"], ms(r["time"]))
            + (f"{r['mean'] / 1e3:,.1f}", f"{r['share']:.1%}")
            for r in rank["kernels"]
        ],
    )
    share = rank["moa"]["share_of_kernel_time"]
    lines += ["", f"MoA's kernels, mixture and gates: {share:.1%} of kernel time"]
    if rank["moa"]["regions"]:
        lines += table(
            ("range, its own time", "forward", "backward"),
            [(n, ms(r["forward"]), ms(r["backward"])) for n, r in rank["moa"]["regions"].items()],
        )
    if rank["ranges"]:
        lines += ["", "device time under each range, ms per step", *_tree(rank["ranges"])]
    if rank["copies"]:
        lines += ["", "copies and fills, per step"]
        lines += table(
            ("kind", "memory", "count", "MB", "ms"),
            [
                (r["kind"], r["memory"], r["count"], f"{r['bytes'] / 1e6:,.3f}", ms(r["time"]))
                for r in rank["copies"]
            ],
        )
    cover = rank["coverage"]
    lines += ["", *ceiling(rank)]
    lines.append(
        f"coverage: {cover['activities']} activities on {cover['streams']} stream(s), "
        f"{cover['without_launch']} without launch, {cover['without_range']} outside of ranges"
    )
    return lines


def visible(nodes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of the tree that are large enough to show."""
    whole = max((node["time"] for node in nodes), default=0.0)
    return [
        node
        for node in nodes
        if node["time"] >= TREE_SHARE * whole and len(node["path"]) <= TREE_DEPTH
    ]


def _tree(nodes: Sequence[dict[str, Any]]) -> list[str]:
    shown = visible(nodes)
    width = max(2 * len(n["path"]) + len(short(n["path"][-1])) for n in shown)
    lines = []
    for node in shown:
        label = "  " * len(node["path"]) + short(node["path"][-1])
        lines.append(f"{label:<{width}}  {ms(node['time']):>12}  {node['count']:>7} activities")
    return lines


def _survey(survey: dict[str, Any]) -> list[str]:
    header = ("rank", "wall", "compute", "communication", "exposed", "idle")
    rows = [(r["rank"], *(ms(r[name]) for name in header[1:])) for r in survey["ranks"]]
    lines = ["== ranks, medians, ms", *table(header, rows), f"verdict: {survey['verdict']}"]
    collectives = survey["collectives"]
    if collectives["matched"]:
        last = ", ".join(f"{name} {count}" for name, count in collectives["last"].items())
        lines.append(f"last to start, of {collectives['matched']} matched collectives: {last}")
    elif "note" in collectives:
        lines.append(f"collectives are not compared: {collectives['note']}")
    return lines


def short(name: str, width: int = 60) -> str:
    """A name that fits a table; its end says more than its middle."""
    return name if len(name) <= width else f"{name[: width - 21]}...{name[-18:]}"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Columns under a header; the first is text, numbers stand to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        texts = [
            f"{cell:<{width}}"
            if column == 0 or not _number(cells[-1][column])
            else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  " + "  ".join(texts).rstrip())
    return lines


def _number(cell: str) -> bool:
    return bool(cell) and cell[0].isdigit() or cell.startswith("-")
