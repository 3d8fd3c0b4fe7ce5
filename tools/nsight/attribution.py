"""Which NVTX range caused which device activity, backward kernels included.

An activity belongs to the ranges that were open on its thread when it was launched. The backward
pass runs outside of the forward's ranges: there torch's ``emit_nvtx``, which Megatron turns on,
names each operation with the sequence number of its forward operation, and that one's ranges count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from tools.nsight.capture import Activity, Capture, NvtxRange
from tools.nsight.classes import COPY, GRAPH, SET, kernel_class

_SUFFIX = re.compile(r", (?:seq|op_id|sizes|input_op_ids) = .*$")
_SEQUENCE = re.compile(r", seq = (\d+)")
_OPERATION = re.compile(r"^\w+::|, (?:seq|op_id) = ")
_BACKWARD = "autograd::engine::evaluate_function"
_NUMBERED = re.compile(r"^(train\.step|ProfilerStep|[Ss]tep|[Ii]teration)[ #_:]*\d+$")


@dataclass(slots=True)
class _Frame:
    end: int
    path: tuple[str, ...]
    backward: bool


def plain(name: str) -> str:
    """A range's name without numbers that differ at every occurrence."""
    name = _SUFFIX.sub("", name)
    return _NUMBERED.sub(r"\1", name)


def is_operation(name: str) -> bool:
    """Whether torch made the range for one operator: too fine for a table."""
    return bool(_OPERATION.search(name))


def attribute(capture: Capture) -> None:
    """Sets ``ranges``, ``backward`` and ``label`` of every activity."""
    events: list[tuple[int, int, NvtxRange | Activity]] = []
    events += [(r.start, 0, r) for r in capture.ranges if r.nested]
    events += [(a.launch, 1, a) for a in capture.activities if a.launch is not None]
    # Stable: ranges that open together keep their order, the outer one first.
    events.sort(key=lambda event: event[:2])
    stacks: dict[int, list[_Frame]] = defaultdict(list)
    forward: dict[tuple[int, int], tuple[str, ...]] = {}
    for time, _, event in events:
        assert event.thread is not None
        stack = stacks[event.thread]
        while stack and stack[-1].end <= time:
            stack.pop()
        top = stack[-1] if stack else _Frame(0, (), False)
        if isinstance(event, Activity):
            event.ranges, event.backward = top.path, top.backward
        else:
            stack.append(_frame(event, top, forward))
    for activity in capture.activities:
        activity.label = _label(activity)


def _frame(
    opened: NvtxRange, parent: _Frame, forward: dict[tuple[int, int], tuple[str, ...]]
) -> _Frame:
    """What a range adds to the path; remembers where forward operations stood."""
    if not is_operation(opened.name):
        return _Frame(opened.end, (*parent.path, plain(opened.name)), False)
    sequence = _SEQUENCE.search(opened.name)
    if sequence is None:
        return _Frame(opened.end, parent.path, parent.backward)
    key = opened.pid, int(sequence.group(1))
    if opened.name.startswith(_BACKWARD):
        return _Frame(opened.end, forward.get(key, parent.path), True)
    if not parent.backward:
        forward[key] = parent.path
    return _Frame(opened.end, parent.path, parent.backward)


def _label(activity: Activity) -> str:
    fixed = {"memcpy": COPY, "memset": SET, "graph": GRAPH}.get(activity.kind)
    # Names anchored at their start are short ones; others hide in template arguments.
    return fixed or kernel_class(f"{activity.name} {activity.full_name}"[:2000], activity.ranges)
