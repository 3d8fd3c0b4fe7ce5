"""Ranks side by side: who computes longest, and for whom the others wait in collectives."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from tools.nsight.classes import NCCL
from tools.nsight.steps import Rank, Step, summary

# A rank is called a straggler when its median compute time exceeds the median rank's by this share,
SLOWER = 0.05
# or when it starts this share of the collectives last, by a median of this many ns: NCCL itself
# and the clocks of one host differ by less, the clocks of several hosts may not.
LAST, LATE = 0.6, 50_000


def survey(ranks: Sequence[Rank]) -> dict[str, Any] | None:
    """Table and verdict over ranks; None for a single one. Times in ns, on one clock.

    Collectives are matched by kernel name and order within a step, where all ranks ran equally
    many; groups that not all ranks belong to are left out that way, or matched across groups.
    """
    if len(ranks) < 2:
        return None
    rows = []
    for rank in ranks:
        table = summary(rank.counted)
        metrics = ("wall", "compute", "communication", "exposed", "idle")
        rows.append({"rank": rank.name} | {name: table[name]["median"] for name in metrics})
    compute = _compute_verdict(rows)
    collectives = _collectives(ranks)
    hosts = {rank.capture.host for rank in ranks}
    return {
        "ranks": rows,
        "compute": compute,
        "collectives": collectives,
        "hosts": sorted(hosts),
        "verdict": _verdict(compute, collectives, len(hosts)),
    }


def _compute_verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    middle = statistics.median(row["compute"] for row in rows)
    slowest = max(rows, key=lambda row: row["compute"])
    excess = slowest["compute"] / middle - 1 if middle else 0.0
    return {"slowest": slowest["rank"], "excess": excess, "straggler": excess > SLOWER}


def _collectives(ranks: Sequence[Rank]) -> dict[str, Any]:
    """How often each rank started a matched collective last, and how late."""
    base: dict[str, Any] = {"matched": 0, "last": {}, "lateness": {}, "straggler": None}
    if any(rank.capture.epoch is None for rank in ranks):
        return base | {"note": "a file lacks the session start time"}
    starts = [_starts(rank) for rank in ranks]
    last: dict[str, int] = {rank.name: 0 for rank in ranks}
    late: dict[str, list[int]] = defaultdict(list)
    matched = 0
    for key in set.intersection(*(set(found) for found in starts)):
        if len({len(found[key]) for found in starts}) > 1:
            continue
        for times in zip(*(found[key] for found in starts)):
            matched += 1
            order = sorted(times)
            name = ranks[times.index(order[-1])].name
            last[name] += 1
            late[name].append(order[-1] - order[-2])
    if not matched:
        return base | {"note": "no collective kernel that all ranks ran equally often in a step"}
    first = max(last, key=lambda name: last[name])
    lateness = {name: statistics.median(values) for name, values in sorted(late.items())}
    guilty = last[first] / matched >= LAST and lateness.get(first, 0) > LATE
    return {
        "matched": matched,
        "last": last,
        "lateness": lateness,
        "straggler": first if guilty else None,
    }


def _starts(rank: Rank) -> dict[tuple[str, str], list[int]]:
    """Start times since 1970 of NCCL kernels, by step and name."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for step in rank.counted:
        for activity in _of_step(rank, step):
            if activity.label == NCCL:
                found[step.label, activity.name].append((rank.capture.epoch or 0) + activity.start)
    return found


def _of_step(rank: Rank, step: Step) -> list[Any]:
    """Activities that start in the step: each belongs to one."""
    low, high = step.window
    return [a for a in rank.activities if low <= a.start < high]


def _verdict(compute: dict[str, Any], collectives: dict[str, Any], hosts: int) -> str:
    parts = []
    if compute["straggler"]:
        parts.append(
            f"{compute['slowest']} computes {compute['excess']:.1%} longer than the median rank"
        )
    if collectives["straggler"]:
        name = collectives["straggler"]
        share = collectives["last"][name] / collectives["matched"]
        parts.append(
            f"{name} starts {share:.0%} of {collectives['matched']} matched collectives last, by "
            f"{collectives['lateness'][name] / 1e3:,.0f} us in the median"
        )
    if not parts:
        parts.append(
            f"no straggler: no rank computes over {SLOWER:.0%} longer than the median, or starts "
            f"{LAST:.0%} of the collectives last by over {LATE / 1e3:.0f} us"
        )
    if hosts > 1:
        parts.append("the ranks ran on several hosts, whose clocks may differ by more than that")
    return "; ".join(parts)
