"""One step as a picture: streams and host ranges over time, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tools.nsight import intervals
from tools.nsight.attribution import is_operation
from tools.nsight.capture import Activity, NvtxRange
from tools.nsight.classes import COLOURS
from tools.nsight.steps import Rank, Step

WIDTH, LEFT, ROW, GAP, DEPTH = 1120, 118, 22, 5, 5
# Inside of the picture, so that it stands alone.
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#5b6875}.lane{fill:#f0f2f5}.grid{stroke:#e3e7ec}"
    ".lane-name{text-anchor:end}.tick{text-anchor:middle}"
    ".range{fill:#e8eef6;stroke:#b7c7dc}.range-name{fill:#1d2733}"
)
# Narrower neighbours of one class are drawn as one: a step has more kernels than a picture pixels.
_PIXEL = 0.5


def draw(rank: Rank, step: Step, note: str = "") -> str:
    """The picture of a step, an ``<svg>`` element without outside references.

    Args:
        note: a line below the lanes.
    """
    low, high = step.window
    scale = (WIDTH - LEFT - 8) / max(high - low, 1)
    rows: list[str] = []
    y = 24
    thread = _busiest_thread(rank, step)
    for row in _layers(rank.capture.ranges, thread, step.window):
        rows.append(_label("host ranges" if not rows else "", y))
        for item in row:
            a, b = max(item.start, low), min(item.end, high)
            rows.append(_range(item.name, LEFT + (a - low) * scale, y, (b - a) * scale, b - a))
        y += ROW
    y += GAP if rows else 0
    streams: dict[int, list[Activity]] = {}
    for activity in rank.inside(step.window):
        streams.setdefault(activity.stream, []).append(activity)
    for stream, activities in sorted(streams.items(), key=lambda entry: -len(entry[1])):
        rows.append(_label(f"stream {stream}", y))
        rows.append(
            f'<rect class="lane" x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 8}" height="18"/>'
        )
        for label, start, end, names in _merged(activities, step.window, _PIXEL / scale):
            x, width = LEFT + (start - low) * scale, max((end - start) * scale, 0.4)
            title = escape(f"{names} · {label} · {(end - start) / 1e3:,.1f} us")
            rows.append(
                f'<rect x="{x:.2f}" y="{y + 1}" width="{width:.2f}" height="16" '
                f'fill="{COLOURS[label]}"><title>{title}</title></rect>'
            )
        y += ROW + GAP
    axis = _axis(high - low, scale, y)
    legend = _legend(sorted({a.label for a in rank.inside(step.window)}, key=list(COLOURS).index))
    rows.append(f'<g transform="translate(0 {y + 6})">{legend}</g>')
    if note:
        y += ROW
        rows.append(f'<text x="{LEFT}" y="{y + 18}">{escape(note)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 28}" role="img" '
        f'aria-label="timeline of step {escape(step.label)}"><style>{_STYLE}</style>'
        f"{axis}{''.join(rows)}</svg>"
    )


def _legend(labels: Sequence[str]) -> str:
    """Colours of the classes, in one line."""
    x, entries = LEFT, []
    for label in labels:
        entries.append(
            f'<rect x="{x}" y="2" width="10" height="10" rx="2" fill="{COLOURS[label]}"/>'
            f'<text x="{x + 14}" y="11">{escape(label)}</text>'
        )
        x += 30 + round(5.7 * len(label))
    return "".join(entries)


def _axis(length: int, scale: float, bottom: int) -> str:
    """Vertical lines at round times."""
    distance = 1
    while length / distance > 10:
        distance *= 10
    for finer in (5, 2):
        if length / distance < 4 and distance % finer == 0:
            distance //= finer
    marks = []
    for time in range(0, length + 1, distance):
        x = LEFT + time * scale
        marks.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{bottom}"/>'
            f'<text class="tick" x="{x:.1f}" y="12">{time / 1e6:g} ms</text>'
        )
    return "".join(marks)


def _label(text: str, y: int) -> str:
    return f'<text class="lane-name" x="{LEFT - 8}" y="{y + 13}">{escape(text)}</text>'


def _range(name: str, x: float, y: int, width: float, time: int) -> str:
    # All of the name, the end of it, or nothing, whatever has room.
    tag = next((t for t in (name, name.rpartition(".")[2]) if len(t) * 6.2 + 6 < width), "")
    text = f'<text class="range-name" x="{x + 4:.1f}" y="{y + 13}">{escape(tag)}</text>'
    title = escape(f"{name} · {time / 1e3:,.1f} us on the host")
    return (
        f'<rect class="range" x="{x:.2f}" y="{y}" width="{max(width, 0.4):.2f}" height="18" rx="2">'
        f"<title>{title}</title></rect>{text if tag else ''}"
    )


def _busiest_thread(rank: Rank, step: Step) -> int | None:
    """The host thread that launched most of the step."""
    counts: dict[int, int] = {}
    named = {item.thread for item in rank.capture.ranges}
    for activity in rank.inside(step.window):
        if activity.thread in named:
            assert activity.thread is not None
            counts[activity.thread] = counts.get(activity.thread, 0) + len(activity.ranges)
    return max(counts, key=lambda thread: counts[thread]) if counts else None


def _layers(
    ranges: Sequence[NvtxRange], thread: int | None, window: intervals.Interval
) -> list[list[NvtxRange]]:
    """Ranges of a thread by depth of nesting, torch's single operations left out."""
    layers: list[list[NvtxRange]] = []
    open_: list[NvtxRange] = []
    for item in ranges:
        if item.thread != thread or not item.nested or is_operation(item.name):
            continue
        while open_ and open_[-1].end <= item.start:
            open_.pop()
        open_.append(item)
        if item.end <= window[0] or item.start >= window[1] or len(open_) > DEPTH:
            continue
        while len(layers) < len(open_):
            layers.append([])
        layers[len(open_) - 1].append(item)
    return [layer for layer in layers if layer]


def _merged(
    activities: Sequence[Activity], window: intervals.Interval, close: float
) -> list[tuple[str, int, int, str]]:
    """Bars of a stream: class, start, end, and the name or number of what is in them."""
    bars: list[list[tuple[str, int, int, str]]] = []
    for a in activities:
        start, end = max(a.start, window[0]), min(a.end, window[1])
        piece = a.label, start, end, a.name
        last = bars[-1][-1] if bars else None
        if last and last[0] == a.label and start - last[2] < close and end - start < 8 * close:
            bars[-1].append(piece)
        else:
            bars.append([piece])
    merged = []
    for group in bars:
        names = group[0][3] if len(group) == 1 else f"{len(group)} x {group[0][3]} and others"
        merged.append((group[0][0], group[0][1], max(piece[2] for piece in group), names))
    return merged
