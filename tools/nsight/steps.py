"""Steps of a rank, and what the device did in each: busy, computing, communicating, waiting.

A step starts with the first device activity that was launched after its first marker and ends where
the next one starts; the last one ends with the last event of the capture. Every time is a union of
intervals, so that nothing that runs at once is counted twice.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tools.nsight import intervals
from tools.nsight.capture import Activity, Capture
from tools.nsight.classes import COMMUNICATION, COPY, MOA, NCCL, NOT_COMPUTE, OTHER_COMM, SET

# The first is ours (moa_megatron/profiling.py); the others are common elsewhere.
_MARKERS = (
    re.compile(r"^train\.step (\d+)$"),
    re.compile(r"^ProfilerStep#(\d+)$"),
    re.compile(r"^(?:step|iteration)[ #_:]*(\d+)$", re.IGNORECASE),
)
METRICS: dict[str, str] = {
    "wall": "from its first activity to the next step's",
    "busy": "anything runs on the device",
    "idle": "nothing runs",
    "compute": "a kernel runs that does not communicate",
    "communication": "a communication kernel runs",
    "nccl": "of these, NCCL's",
    "dispatcher": "of these, others, such as a token dispatcher's",
    "exposed": "communication runs and no compute does",
    "copies": "a memcpy or memset runs",
    "starved": "idle, and the next activity not yet launched by the host",
    "moa": "a kernel of mixture or gates runs",
    "moa_alone": "such a kernel runs, and nothing else",
}


@dataclass(frozen=True)
class Step:
    """One step; times in ns, ``metrics`` by the names of ``METRICS``."""

    label: str
    window: intervals.Interval
    counted: bool
    metrics: dict[str, int]


@dataclass
class Rank:
    """One device of one process: what ranks are in a training run."""

    name: str
    capture: Capture
    pid: int
    device: int
    activities: list[Activity]
    steps: list[Step]
    source: str

    @property
    def counted(self) -> list[Step]:
        """The steps that medians and tables are made of."""
        return [step for step in self.steps if step.counted]

    def inside(self, window: intervals.Interval) -> list[Activity]:
        """Activities of a step, those that reach over its borders included."""
        return [a for a in self.activities if a.end > window[0] and a.start < window[1]]


def ranks_of(capture: Capture) -> list[Rank]:
    """The ranks of a file: one where nsys ran around a rank, several where around torchrun."""
    groups: dict[tuple[int, int], list[Activity]] = {}
    for activity in capture.activities:
        groups.setdefault((activity.pid, activity.device), []).append(activity)
    named = re.search(r"-rank(\d+)$", capture.file.stem)
    ranks = []
    for (pid, device), activities in sorted(groups.items()):
        name = f"rank {named.group(1)}" if named and len(groups) == 1 else capture.file.stem
        if len(groups) > 1:
            name += f", process {pid >> 24 & 0xFFFFFF}, device {device}"
        steps, source = _steps(capture, pid, activities)
        ranks.append(Rank(name, capture, pid, device, activities, steps, source))
    return ranks


def _steps(capture: Capture, pid: int, activities: list[Activity]) -> tuple[list[Step], str]:
    whole = activities[0].start, max(a.end for a in activities)
    markers = _markers(capture, pid)
    if not markers:
        return [Step("capture", whole, True, measure(activities, whole))], "the whole capture"
    borders: list[int] = []
    times = [time for _, time in markers]
    launched = sorted((a.launch, a.start) for a in activities if a.launch is not None)
    for time, following in zip(times, [*times[1:], capture.end + 1]):
        starts = [start for launch, start in launched if time <= launch < following]
        border = min(starts) if starts else time
        borders.append(max(border, borders[-1]) if borders else border)
    borders.append(max(capture.end, borders[-1]))
    steps = []
    for index, (label, _) in enumerate(markers):
        window = borders[index], borders[index + 1]
        # With what the next step begins with, for the wait before it.
        inside = [a for a in activities if a.end > window[0] and a.start <= window[1]]
        # The profiler starts up inside the first one.
        counted = index > 0 or len(markers) == 1
        steps.append(Step(label, window, counted, measure(inside, window)))
    return steps, "NVTX"


def _markers(capture: Capture, pid: int) -> list[tuple[str, int]]:
    """Step numbers and the time of their first marker, in order of time."""
    for pattern in _MARKERS:
        first: dict[str, int] = {}
        for item in capture.ranges:
            found = pattern.match(item.name) if item.pid == pid else None
            if found:
                first.setdefault(found.group(1), item.start)
        if first:
            return sorted(first.items(), key=lambda marker: marker[1])
    return []


def measure(activities: Sequence[Activity], window: intervals.Interval) -> dict[str, int]:
    """``METRICS`` of one window, ns."""

    def covered(
        labels: Iterable[str] | None = None, without: bool = False
    ) -> list[tuple[int, int]]:
        chosen = set(labels or ())
        picked = (
            a.interval for a in activities if labels is None or (a.label in chosen) != without
        )
        return intervals.union(intervals.clip(picked, window))

    busy, compute = covered(without=True), covered(NOT_COMPUTE, without=True)
    communication, moa = covered(COMMUNICATION), covered(MOA)
    others = covered(MOA, without=True)
    size = intervals.length
    wall = window[1] - window[0]
    return {
        "wall": wall,
        "busy": size(busy),
        "idle": wall - size(busy),
        "compute": size(compute),
        "communication": size(communication),
        "nccl": size(covered((NCCL,))),
        "dispatcher": size(covered((OTHER_COMM,))),
        "exposed": size(intervals.difference(communication, compute)),
        "copies": size(covered((COPY, SET))),
        "starved": _starved(activities, busy, window),
        "moa": size(moa),
        "moa_alone": size(intervals.difference(moa, others)),
    }


def _starved(
    activities: Sequence[Activity], busy: list[intervals.Interval], window: intervals.Interval
) -> int:
    """Idle time before the host has called the launch of what runs next."""
    launches: dict[int, int] = {}
    for a in activities:
        if a.launch is not None:
            launches[a.start] = min(a.launch, launches.get(a.start, a.launch))
    total = 0
    for start, end in intervals.difference([window], busy):
        if end in launches:
            total += max(0, min(launches[end], end) - start)
    return total


def summary(steps: Sequence[Step]) -> dict[str, dict[str, float]]:
    """Minimum, median and maximum of each metric over steps, ns."""
    table = {}
    for metric in METRICS:
        values = [step.metrics[metric] for step in steps]
        table[metric] = {
            "min": min(values),
            "median": statistics.median(values),
            "max": max(values),
        }
    return table
