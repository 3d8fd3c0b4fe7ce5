"""Reads one nsys export (SQLite) into plain records, whatever the version that wrote it.

Tables and columns are looked up, never assumed: exports create tables only for what was seen, and
names changed between versions. What is relied on was checked in exports of nsys 2022.2.1 (schema
2.9.1: no ENUM tables, EXPORT_META_DATA) and 2024.5.1 (schema 3.13.2: ENUM tables, META_DATA_EXPORT,
DIAGNOSTIC_EVENT), which carry kernels, copies, launches and, the first, NVTX ranges; and against
the schema reference of Nsight Systems' user guide. Newer versions have been read in that reference
only. Facts used: times are ns since the session's start; globalPid is globalTid with the low 24
bits cleared; a launch and its activity share (process, correlationId); wrappers may give one
correlationId two rows; NVTX event type 59 is push/pop, 60 start/end.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_KERNEL, _COPY, _SET, _GRAPH = (
    f"CUPTI_ACTIVITY_KIND_{kind}" for kind in ("KERNEL", "MEMCPY", "MEMSET", "GRAPH_TRACE")
)
_CALLS = ("CUPTI_ACTIVITY_KIND_RUNTIME", "CUPTI_ACTIVITY_KIND_DRIVER")
_PUSH_POP, _START_END, _MARK = 59, 60, 34
# Values of the ENUM tables, for exports that are older than these.
_DIRECTIONS = {
    1: "Host-to-Device",
    2: "Device-to-Host",
    8: "Device-to-Device",
    9: "Host-to-Host",
    10: "Peer-to-Peer",
}
_MEMORY = {0: "Pageable", 1: "Pinned", 2: "Device", 3: "Array", 4: "Managed"}
_LOSS = re.compile(r"drop|lost|lose|not all|incomplete|truncat|overflow|not supported", re.I)


@dataclass(slots=True)
class Activity:
    """One kernel, copy, fill or unopened CUDA graph on a device; times in ns of the session."""

    start: int
    end: int
    kind: str
    name: str
    device: int
    stream: int
    pid: int
    correlation: int = 0
    full_name: str = ""
    launch: int | None = None
    thread: int | None = None
    bytes: int = 0
    memory: str = ""
    label: str = ""
    ranges: tuple[str, ...] = ()
    backward: bool = False

    @property
    def interval(self) -> tuple[int, int]:
        """From start to end."""
        return self.start, self.end


@dataclass(slots=True)
class NvtxRange:
    """A range on a host thread; times in ns of the session."""

    start: int
    end: int
    name: str
    thread: int
    nested: bool

    @property
    def pid(self) -> int:
        """The process, as activities name it."""
        return process_of(self.thread)


@dataclass
class Capture:
    """What one file holds; ``epoch`` is the session's start, ns since 1970, None where unknown."""

    file: Path
    version: str = "unknown"
    host: str = ""
    epoch: int | None = None
    activities: list[Activity] = field(default_factory=list)
    ranges: list[NvtxRange] = field(default_factory=list)
    gpus: dict[int, str] = field(default_factory=dict)
    end: int = 0
    warnings: list[str] = field(default_factory=list)


def process_of(thread: int) -> int:
    """globalPid of a globalTid."""
    return thread >> 24 << 24


def read(file: Path) -> Capture:
    """All that the report needs from one export.

    Raises:
        ValueError: for what is no readable export with device activity, with the cure.
    """
    _check_header(file)
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return _read(file, _Tables(database))
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{file} is damaged or was cut off ({error}): export it again with nsys export "
            "--type sqlite"
        ) from error


def _check_header(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if not head:
        raise ValueError(f"{file} is empty: nsys did not finish writing it; capture again")
    if head != b"SQLite format 3\0":
        raise ValueError(
            f"{file} is not SQLite: give what nsys export --type sqlite wrote, or the .nsys-rep"
        )


class _Tables:
    """Rows by column name; a column or table that this version lacks reads as None or as empty."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database
        # Real exports hold strings that are no UTF-8, such as paths and raw output of processes.
        database.text_factory = lambda raw: raw.decode("utf-8", errors="replace")
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        self.names = {name for (name,) in names}
        self.strings: dict[Any, str] = dict(self.rows("StringIds", "id", "value"))

    def columns(self, table: str) -> set[str]:
        return {row[1] for row in self.database.execute(f'PRAGMA table_info("{table}")')}

    def rows(self, table: str, *columns: str) -> Iterator[tuple[Any, ...]]:
        if table not in self.names:
            return iter(())
        there = self.columns(table)
        wanted = ", ".join(f'"{name}"' if name in there else "NULL" for name in columns)
        return iter(self.database.execute(f'SELECT {wanted} FROM "{table}"'))

    def text(self, value: Any) -> str:
        """A name, which versions store as text or as the id of one."""
        return value if isinstance(value, str) else self.strings.get(value, "")

    def enum(self, table: str, otherwise: dict[int, str]) -> dict[int, str]:
        found = {key: label for key, label in self.rows(table, "id", "label") if label}
        return otherwise | found


def _read(file: Path, tables: _Tables) -> Capture:
    capture = Capture(file)
    meta = dict(tables.rows("EXPORT_META_DATA", "name", "value"))
    meta |= dict(tables.rows("META_DATA_EXPORT", "name", "value"))
    if "StringIds" not in tables.names or not (
        meta or any(name.startswith(("CUPTI_", "TARGET_INFO_", "NVTX_")) for name in tables.names)
    ):
        known = ", ".join(sorted(tables.names)[:3]) or "none"
        raise ValueError(f"{file} is SQLite, but no export of nsys (its tables: {known})")
    product, schema = meta.get("EXPORT_PRODUCT_VERSION"), meta.get("EXPORT_SCHEMA_VERSION")
    if product:
        capture.version = f"{product}, schema {schema or 'unknown'}"
    for (epoch,) in tables.rows("TARGET_INFO_SESSION_START_TIME", "utcEpochNs"):
        capture.epoch = epoch
    for name, value in tables.rows("TARGET_INFO_SYSTEM_ENV", "name", "value"):
        if name == "Hostname":
            capture.host = str(value)
    capture.gpus = {key: name or "" for key, name in tables.rows("TARGET_INFO_GPU", "id", "name")}
    capture.activities = sorted(_activities(tables), key=lambda a: (a.start, a.end))
    if not capture.activities:
        raise ValueError(
            f"{file} holds no device activity: was --profile-step-start reached, and nsys told to "
            "trace cuda?"
        )
    last_call = _correlate(tables, capture)
    capture.ranges = _ranges(tables)
    ends = [a.end for a in capture.activities] + [r.end for r in capture.ranges]
    capture.end = max([last_call, *ends])
    for item in capture.ranges:
        item.end = capture.end if item.end < item.start else item.end
    _warn(tables, capture)
    return capture


def _activities(tables: _Tables) -> Iterator[Activity]:
    place = ("start", "end", "deviceId", "streamId", "globalPid", "correlationId")

    def at(kind: str, name: str, values: tuple[Any, ...]) -> Activity:
        start, end, device, stream, pid, correlation = (value or 0 for value in values)
        return Activity(start, end, kind, name, device, stream, pid, correlation)

    for *where, short, full in tables.rows(_KERNEL, *place, "shortName", "demangledName"):
        name = tables.text(short) or tables.text(full) or "unnamed kernel"
        kernel = at("kernel", name, tuple(where))
        kernel.full_name = tables.text(full)
        yield kernel
    directions = tables.enum("ENUM_CUDA_MEMCPY_OPER", _DIRECTIONS)
    memory = tables.enum("ENUM_CUDA_MEM_KIND", _MEMORY)
    for *where, size, kind, source, target in tables.rows(
        _COPY, *place, "bytes", "copyKind", "srcKind", "dstKind"
    ):
        copy = at("memcpy", directions.get(kind, f"kind {kind}"), tuple(where))
        copy.bytes = size or 0
        sides = (memory.get(side, "unknown").lower() for side in (source, target))
        copy.memory = " to ".join(sides)
        yield copy
    for *where, size in tables.rows(_SET, *place, "bytes"):
        fill = at("memset", "memset", tuple(where))
        fill.bytes = size or 0
        yield fill
    for where in tables.rows(_GRAPH, *place):
        yield at("graph", "CUDA graph", tuple(where))


def _correlate(tables: _Tables, capture: Capture) -> int:
    """Gives every activity the time and thread of its launch; returns the last call's end."""
    calls: dict[tuple[int, int], tuple[int, int]] = {}
    last = 0
    for table in _CALLS:
        for start, end, thread, correlation in tables.rows(
            table, "start", "end", "globalTid", "correlationId"
        ):
            last = max(last, end or start)
            if correlation is None or thread is None:
                continue
            key = process_of(thread), correlation
            if key not in calls or start < calls[key][0]:
                calls[key] = start, thread
    for item in capture.activities:
        item.launch, item.thread = calls.get((item.pid, item.correlation), (None, None))
    return last


def _ranges(tables: _Tables) -> list[NvtxRange]:
    """Ranges of the default domain, which is where Megatron and torch put theirs."""
    found = []
    for start, end, kind, text, text_id, thread, domain in tables.rows(
        "NVTX_EVENTS", "start", "end", "eventType", "text", "textId", "globalTid", "domainId"
    ):
        name = text or tables.text(text_id)
        if domain or not name or kind not in (_PUSH_POP, _START_END, _MARK):
            continue
        end = start if kind == _MARK else -1 if end is None else end
        found.append(NvtxRange(start, end, name, thread or 0, kind == _PUSH_POP))
    return sorted(found, key=lambda r: (r.start, -r.end if r.end >= 0 else -(2**62)))


def _warn(tables: _Tables, capture: Capture) -> None:
    said = capture.warnings
    for severity, text in tables.rows("DIAGNOSTIC_EVENT", "severity", "text"):
        about = "CUDA" in text or "NVTX" in text
        if severity == 3 or (severity == 2 and (about or _LOSS.search(text))):
            said.append(f"nsys says: {' '.join(text.split())}")
    if not capture.ranges:
        said.append(
            "no NVTX ranges: time is not split by layer part or step; profile with --nvtx-ranges "
            "and trace nvtx"
        )
    lost = sum(a.launch is None for a in capture.activities)
    if lost:
        said.append(
            f"{lost} of {len(capture.activities)} device activities have no launch in the capture "
            "(launched before it began, or events were lost): no range is known for them"
        )
    if any(a.kind == "graph" for a in capture.activities):
        said.append("CUDA graphs are recorded whole: capture with --cuda-graph-trace=node")
    if capture.epoch is None:
        said.append("no session start time: this file cannot be put on one clock with others")
