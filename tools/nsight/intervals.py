"""Sets of times: unions and differences of half-open intervals, in whole nanoseconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[int, int]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times as disjoint intervals in order; neighbours are joined, empty ones dropped."""
    joined: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def difference(kept: Sequence[Interval], taken: Sequence[Interval]) -> list[Interval]:
    """Times in ``kept`` and not in ``taken``; both as ``union`` returns them."""
    rest: list[Interval] = []
    first = 0
    for start, end in kept:
        while first < len(taken) and taken[first][1] <= start:
            first += 1
        place = first
        while place < len(taken) and taken[place][0] < end:
            if taken[place][0] > start:
                rest.append((start, taken[place][0]))
            start = max(start, taken[place][1])
            place += 1
        if start < end:
            rest.append((start, end))
    return rest


def clip(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """The parts inside ``window``."""
    low, high = window
    return [(max(a, low), min(b, high)) for a, b in intervals if b > low and a < high]


def length(intervals: Iterable[Interval]) -> int:
    """Sum of the lengths, ns; of a union that is the time covered."""
    return sum(end - start for start, end in intervals)
