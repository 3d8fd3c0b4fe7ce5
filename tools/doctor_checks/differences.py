"""What only all nodes together show: other versions, clocks apart, a folder that is not shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tools.doctor_checks.host import Finding

GROUP = "nodes"
# What must be the same everywhere, or ranks compute different things or cannot talk.
_SAME = ("python", "torch", "NCCL", "megatron-core", "revision", "patches", "emerging-optimizers")
_CLOCK_WARNING, _CLOCK_NOTE = 1.0, 0.1
_ROOM_RATIO = 0.9


def compare(reports: list[dict[str, Any]]) -> Iterator[Finding]:
    """Differences between nodes, each with who has what."""
    firsts: dict[str, dict[str, Any]] = {}
    for report in sorted(reports, key=lambda r: (r["local"], r["rank"])):
        firsts.setdefault(report["host"], report)
    tables = {
        name: {f["check"]: f["value"] for f in report["findings"] if f["value"] is not None}
        for name, report in firsts.items()
    }
    differing = 0
    for check in sorted({check for table in tables.values() for check in table}):
        values: dict[str, list[str]] = {}
        for name, table in tables.items():
            values.setdefault(table.get(check, "nothing"), []).append(name)
        if len(values) > 1:
            differing += 1
            yield _difference(check, values)
    yield from _clocks(firsts)
    yield from _folders(firsts)
    if not differing:
        text = f"{len(firsts)} nodes, {len(reports)} tasks: versions, driver, devices are the same"
        yield Finding("ok", "nodes", text, group=GROUP)


def _difference(check: str, values: Mapping[str, list[str]]) -> Finding:
    text = "; ".join(f"{value} on {_some(names)}" for value, names in values.items())
    level = "error" if check in _SAME else "warning"
    rare = min(values.values(), key=len)
    cure = f"make {_some(rare)} like the others, or exclude it"
    return Finding(level, f"{check} differs", text, cure, group=GROUP)


def _clocks(firsts: Mapping[str, dict[str, Any]]) -> Iterator[Finding]:
    offsets = {name: report.get("offset", 0.0) for name, report in firsts.items()}
    worst = max(offsets, key=lambda name: abs(offsets[name]))
    seconds = abs(offsets[worst])
    text = f"at most {seconds:.3f} s off rank 0's ({worst})"
    if seconds > _CLOCK_NOTE:
        level = "warning" if seconds > _CLOCK_WARNING else "note"
        yield Finding(level, "clocks", text, "start chronyd on all nodes", group=GROUP)
    elif len(firsts) > 1:
        yield Finding("ok", "clocks", text, group=GROUP)


def _folders(firsts: Mapping[str, dict[str, Any]]) -> Iterator[Finding]:
    blind = [name for name, report in firsts.items() if report.get("sees") is False]
    if blind:
        text = f"{_some(blind)} does not see what rank 0 writes into the run folder"
        cure = "name a folder on the shared file system with --run-dir"
        yield Finding("error", "run folder", text, cure, group=GROUP)
        return
    free = {name: report["free"] for name, report in firsts.items() if report.get("free")}
    least = min(free, key=lambda name: free[name], default=None)
    if least is not None and free[least] < _ROOM_RATIO * max(free.values()):
        text = f"{least} has {free[least] >> 30} GiB free, others up to {max(free.values()) >> 30}"
        cure = "is it one shared folder, or a quota? see --run-dir"
        yield Finding("warning", "free disk differs", text, cure, group=GROUP)
    elif len(firsts) > 1:
        yield Finding("ok", "run folder", "all nodes see what rank 0 writes", group=GROUP)


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
