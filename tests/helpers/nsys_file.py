"""Writes small SQLite files as two versions of nsys export them, from one description.

``old`` follows nsys 2022.2 (export schema 2.9), ``new`` 2024.5 (schema 3.13): names of the tables
and columns that the report reads are those of real exports of these versions.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PID = 7 << 24
MAIN, BACKWARD = PID | 100, PID | 101
VERSIONS = ("old", "new")
_PLACE = "start INTEGER, end INTEGER, deviceId INTEGER, contextId INTEGER, streamId INTEGER"
_CAUSE = "correlationId INTEGER, globalPid INTEGER"


@dataclass
class NsysFile:
    """Events of one capture; times in ns."""

    epoch: int | None = 1_000_000_000
    host: str = "node0"
    _kernels: list[tuple[Any, ...]] = field(default_factory=list)
    _copies: list[tuple[Any, ...]] = field(default_factory=list)
    _fills: list[tuple[Any, ...]] = field(default_factory=list)
    _graphs: list[tuple[Any, ...]] = field(default_factory=list)
    _calls: list[tuple[Any, ...]] = field(default_factory=list)
    _ranges: list[tuple[Any, ...]] = field(default_factory=list)
    _diagnostics: list[tuple[int, str]] = field(default_factory=list)
    _strings: dict[str, int] = field(default_factory=dict)

    def kernel(
        self,
        name: str,
        start: int,
        end: int,
        launch: int | None = None,
        stream: int = 7,
        thread: int = MAIN,
        device: int = 0,
        full: str | None = None,
    ) -> None:
        """A kernel; ``launch`` is when the host called for it, None for an unknown call."""
        cause = self._call(launch, thread)
        names = self._id(full or name), self._id(name)
        self._kernels.append((start, end, device, 1, stream, cause, thread >> 24 << 24, *names))

    def copy(self, kind: int, source: int, target: int, start: int, end: int, size: int) -> None:
        """A memcpy: 1 host to device, 2 back; memory 0 pageable, 1 pinned, 2 device."""
        cause = self._call(start - 1, MAIN)
        self._copies.append((start, end, 0, 1, 7, cause, PID, size, kind, source, target))

    def fill(self, start: int, end: int, size: int) -> None:
        """A memset."""
        self._fills.append((start, end, 0, 1, 7, self._call(start - 1, MAIN), PID, 0, size))

    def graph(self, start: int, end: int) -> None:
        """A CUDA graph recorded as a whole."""
        self._graphs.append((start, end, 0, 1, 7, self._call(start - 1, MAIN), PID, 1, 1))

    def range(
        self, name: str, start: int, end: int | None, thread: int = MAIN, domain: int = 0
    ) -> None:
        """A push/pop range; end None for one that was open when the capture ended."""
        self._ranges.append((name, start, end, thread, domain))

    def diagnose(self, severity: int, text: str) -> None:
        """A message of nsys: 2 warning, 3 error. The old version has no table for it."""
        self._diagnostics.append((severity, text))

    def _id(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings) + 1)

    def _call(self, launch: int | None, thread: int) -> int:
        if launch is None:
            return 0
        correlation = len(self._calls) + 100
        name = self._id("cudaLaunchKernel_v7000")
        self._calls.append((launch, launch + 2, 0, thread, correlation, name))
        return correlation

    def write(self, path: Path, version: str = "new") -> Path:
        """The file at ``path``, in the form of a version."""
        path.unlink(missing_ok=True)
        with closing(sqlite3.connect(path)) as database, database:
            self._tables(database, new=version == "new")
        return path

    def _tables(self, database: sqlite3.Connection, new: bool) -> None:
        def table(name: str, columns: str, rows: list[tuple[Any, ...]]) -> None:
            if new and not rows:
                return  # newer versions create a table for what they have seen only
            database.execute(f"CREATE TABLE {name} ({columns})")
            marks = ", ".join("?" * len(columns.split(",")))
            database.executemany(f"INSERT INTO {name} VALUES ({marks})", rows)

        kinds = "CUPTI_ACTIVITY_KIND_"
        green = [(*row[:4], None, *row[4:]) for row in self._kernels]
        if new:
            place = _PLACE.replace("streamId", "greenContextId INTEGER, streamId")
            columns = f"{place}, {_CAUSE}, demangledName INTEGER, shortName INTEGER"
            table(f"{kinds}KERNEL", columns, green)
        else:
            columns = f"{_PLACE}, {_CAUSE}, demangledName INTEGER, shortName INTEGER"
            table(f"{kinds}KERNEL", columns, self._kernels)
        columns = f"{_PLACE}, {_CAUSE}, bytes INTEGER, copyKind INTEGER, srcKind INTEGER"
        table(f"{kinds}MEMCPY", f"{columns}, dstKind INTEGER", self._copies)
        table(f"{kinds}MEMSET", f"{_PLACE}, {_CAUSE}, value INTEGER, bytes INTEGER", self._fills)
        columns = f"{_PLACE}, {_CAUSE}, graphId INTEGER, graphExecId INTEGER"
        table(f"{kinds}GRAPH_TRACE", columns, self._graphs)
        columns = "start INTEGER, end INTEGER, eventClass INTEGER, globalTid INTEGER"
        columns += ", correlationId INTEGER, nameId INTEGER"
        # The older version records some calls twice under one id, the wrapper a little later.
        twice = [(start + 1, end - 1, 67, *rest) for start, end, _, *rest in self._calls]
        table(f"{kinds}RUNTIME", columns, self._calls if new else [*twice, *self._calls])
        self._nvtx(table, new)
        self._about(table, new)

    def _nvtx(self, table: Any, new: bool) -> None:
        rows = []
        for name, start, end, thread, domain in self._ranges:
            text, text_id = (None, self._id(name)) if new else (name, None)
            rows.append((start, end, 59, text, thread, text_id, domain))
        columns = "start INTEGER, end INTEGER, eventType INTEGER, text TEXT, globalTid INTEGER"
        table("NVTX_EVENTS", f"{columns}, textId INTEGER, domainId INTEGER", rows)

    def _about(self, table: Any, new: bool) -> None:
        strings = [(number, text) for text, number in self._strings.items()]
        table("StringIds", "id INTEGER, value TEXT", strings)
        version = ("2024.5.1.113", "3.13.2") if new else ("2022.2.1.31", "2.9.1")
        names = ("EXPORT_PRODUCT_VERSION", "EXPORT_SCHEMA_VERSION")
        meta = "META_DATA_EXPORT" if new else "EXPORT_META_DATA"
        table(meta, "name TEXT, value TEXT", list(zip(names, version)))
        if self.epoch is not None:
            columns = "utcEpochNs INTEGER, utcTime TEXT, localTime TEXT"
            table("TARGET_INFO_SESSION_START_TIME", columns, [(self.epoch, "", "")])
        table("TARGET_INFO_SYSTEM_ENV", "name TEXT, value TEXT", [("Hostname", self.host)])
        table("TARGET_INFO_GPU", "id INTEGER, name TEXT", [(0, "Synthetic GPU")])
        if not new:
            return
        labels = [(0, "P", "Pageable"), (1, "Q", "Pinned"), (2, "D", "Device")]
        table("ENUM_CUDA_MEM_KIND", "id INTEGER, name TEXT, label TEXT", labels)
        labels = [(1, "H", "Host-to-Device"), (2, "D", "Device-to-Host")]
        table("ENUM_CUDA_MEMCPY_OPER", "id INTEGER, name TEXT, label TEXT", labels)
        columns = "timestamp INTEGER, source INTEGER, severity INTEGER, text TEXT"
        table("DIAGNOSTIC_EVENT", columns, [(0, 1, *said) for said in self._diagnostics])


def training() -> NsysFile:
    """Steps 5 to 7; the first starts the profiler, the others are small enough to add up."""
    file = NsysFile()
    file.range("train.step 5", 100, 180)
    file.kernel("nvjet_hsh", 200, 300, launch=110)
    for name, start, end in (
        ("train.step 6", 1000, 1500),
        ("moe.routed", 1010, 1400),
        ("moe.experts", 1020, 1390),
        ("moa.gate", 1030, 1060),
        ("aten::mm, seq = 41", 1035, 1055),
        ("moa.fc1", 1070, 1100),
        ("moa.mixture", 1110, 1150),
    ):
        file.range(name, start, end)
    file.kernel("nvjet_hsh", 1100, 1200, launch=1040)
    file.kernel("nvjet_hsh", 1200, 1500, launch=1080)
    file.kernel("mixture_forward", 1500, 1600, launch=1120)
    file.kernel("ncclDevKernel_AllReduce", 1400, 1800, launch=1450, stream=13)
    backward = "autograd::engine::evaluate_function: MmBackward0, seq = 41"
    file.range(backward, 1850, 1890, thread=BACKWARD)
    file.kernel("nvjet_hsh", 1900, 2000, launch=1860, thread=BACKWARD)
    file.copy(1, 1, 2, 2000, 2050, size=1000)
    file.range("train.step 7", 2500, 2900)
    file.kernel("nvjet_hsh", 2600, 2900, launch=2510)
    file.range("Optimizer.step#AdamW.step", 2920, 2960)
    file.kernel("multi_tensor_apply_kernel", 2940, 3000, launch=2930)
    return file
