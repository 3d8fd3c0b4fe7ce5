"""Readers of documents, which count and locate what they leave out.

`read_slice` reads JSON lines and plain text, packed or not; `inputs.list_files` finds them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from moa_megatron.data import containers
from moa_megatron.data.inputs import Slice, SourceFile

MAX_LINE_BYTES = 64 << 20
_BOM = b"\xef\xbb\xbf"
_LOCATIONS_KEPT = 5
_SKIP_BYTES = 1 << 20
_TOO_LONG = "longer than --max-line-bytes"


@dataclass(frozen=True)
class Document:
    """`key` decides the split: the relative path of a whole file, the text of a jsonl line."""

    text: str
    key: str
    num_bytes: int


class Location(NamedTuple):
    """Where something is: `line` counts from 1 within its slice of the file."""

    path: str
    line: int
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class ReadReport:
    """Counts by kind, with the first locations of each; `skipped` is left out, `noted` is not.

    `num_lines` and `num_bytes` (of the file itself, compressed where it is) are what has been read.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    locations: dict[str, list[Location]] = field(default_factory=dict)
    num_lines: int = 0
    num_bytes: int = 0

    def add(self, counts: Counter[str], kind: str, location: Location) -> None:
        counts[kind] += 1
        first = self.locations.setdefault(kind, [])
        if len(first) < _LOCATIONS_KEPT:
            first.append(location)

    def merge(self, other: "ReadReport", lines_before: int) -> None:
        """Add what was found further on; in a file of which `lines_before` are here already."""
        self.skipped.update(other.skipped)
        self.noted.update(other.noted)
        for kind, locations in other.locations.items():
            first = self.locations.setdefault(kind, [])
            moved = [at._replace(line=at.line + lines_before) for at in locations]
            first.extend(moved[: _LOCATIONS_KEPT - len(first)])

    def lines(self) -> list[str]:
        """One line a kind: what, how often, where first."""
        return [
            f"{title} {count:,} x {kind}: {', '.join(map(str, self.locations[kind]))}"
            + (", ..." if count > _LOCATIONS_KEPT else "")
            for title, counts in (("skipped", self.skipped), ("noted", self.noted))
            for kind, count in sorted(counts.items())
        ]

    def refuse_skipped(self) -> None:
        """Raise ValueError with the report if anything was skipped."""
        if self.skipped:
            raise ValueError(
                f"{self.skipped.total():,} bad lines or files, and strict was asked for:\n"
                + "\n".join(self.lines())
            )


class _Bad(Exception):
    """One line or file that yields no document; `offset` in bytes into it."""

    def __init__(self, kind: str, offset: int = 0) -> None:
        super().__init__(kind)
        self.kind, self.offset = kind, offset


def in_validation(key: str, fraction: float) -> bool:
    """Whether a document is held out: by its key's hash, so in any order, machine and subset."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def read_documents(
    files: Sequence[SourceFile],
    report: ReadReport,
    json_key: str = "text",
    strict: bool = False,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Document]:
    """Documents of whole files in their order: `read_slice` of each.

    Raises:
        ValueError: with `strict`, after the last document, if anything was skipped.
    """
    for file in files:
        yield from read_slice(Slice(file, 0, file.size), report, json_key, max_line_bytes)
    if strict:
        report.refuse_skipped()


def read_slice(
    part: Slice, report: ReadReport, json_key: str = "text", max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Document]:
    """Documents of a slice: one a line of JSON lines, the whole file of anything else.

    Lines and files that are no UTF-8 text, or longer than `max_line_bytes`, are skipped, counted
    and located in `report`; memory stays within a small multiple of that limit. Of a damaged
    compressed file the lines before the damage are kept. Byte order marks are stripped. CRLF is
    kept byte for byte inside texts (in JSON lines it may also end a line, which belongs to no
    text). Both are noted in `report`.
    """
    before, lines_before, path = report.num_bytes, report.num_lines, str(part.file.path)
    with containers.Source(part.file.path) as source:
        try:
            if part.file.has_lines:
                for raw in _lines(source.stream, part, max_line_bytes):
                    report.num_lines += 1
                    number = report.num_lines - lines_before
                    if report.num_lines % 256 == 0:  # asking costs as much as a short line
                        report.num_bytes = before + source.consumed - part.start
                    document = _json_document(raw, Location(path, number), report, json_key)
                    if document:
                        yield document
                if part.start == 0 and report.num_lines == lines_before:
                    report.add(report.skipped, "empty or blank", Location(path, 1))
            else:
                body = source.stream.read(max_line_bytes + 1)
                document = _whole_document(body, part.file, report, max_line_bytes)
                if document:
                    yield document
        except containers.DamagedError as error:
            line = report.num_lines - lines_before + 1
            report.add(report.skipped, "damaged file", Location(path, line, str(error)))
    report.num_bytes = before + part.end - part.start


def _lines(stream: BinaryIO, part: Slice, limit: int) -> Iterator[bytes | None]:
    """Lines with their ends; None for one over the limit, which is passed over."""
    position = part.start
    if part.start:
        # The byte before decides whether a line starts here or the one before goes on.
        stream.seek(part.start - 1)
        position += _pass_line(stream) - 1
    can_be_cut = part.file.can_be_cut
    while not can_be_cut or position < part.end:
        raw = stream.readline(limit + 1)
        if not raw:
            return
        position += len(raw)
        if len(raw) > limit and not raw.endswith(b"\n"):
            position += _pass_line(stream)
            yield None
        else:
            yield raw


def _pass_line(stream: BinaryIO) -> int:
    """Read to the end of the line; its bytes."""
    size = 0
    while raw := stream.readline(_SKIP_BYTES):
        size += len(raw)
        if raw.endswith(b"\n"):
            break
    return size


def _json_document(
    raw: bytes | None, location: Location, report: ReadReport, json_key: str
) -> Document | None:
    if raw is None:
        report.add(report.skipped, _TOO_LONG, location)
        return None
    if raw.startswith(_BOM):
        report.add(report.noted, "byte order mark stripped", location)
    if raw.endswith(b"\r\n"):
        report.add(report.noted, "CRLF line end", location)
    try:
        text = _json_text(_decode(raw.removeprefix(_BOM)), json_key)
    except _Bad as bad:
        report.add(report.skipped, bad.kind, location)
        return None
    return Document(text, text, len(raw))


def _whole_document(
    raw: bytes, file: SourceFile, report: ReadReport, limit: int
) -> Document | None:
    path = str(file.path)
    if len(raw) > limit:
        report.add(report.skipped, _TOO_LONG, Location(path, 1))
        return None
    if raw.startswith(_BOM):
        report.add(report.noted, "byte order mark stripped", Location(path, 1))
    if (crlf := raw.find(b"\r\n")) >= 0:
        line = raw.count(b"\n", 0, crlf) + 1
        report.add(report.noted, "file with CRLF line ends, kept", Location(path, line))
    body = raw.removeprefix(_BOM)
    try:
        text = _decode(body)
    except _Bad as bad:
        line = body.count(b"\n", 0, bad.offset) + 1
        report.add(report.skipped, bad.kind, Location(path, line))
        return None
    return Document(text, file.key, len(raw))


def _decode(raw: bytes) -> str:
    if (nul := raw.find(b"\0")) >= 0:
        raise _Bad("NUL byte", nul)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Bad("invalid UTF-8", error.start) from None
    if not text or text.isspace():
        raise _Bad("empty or blank")
    return text


def _json_text(line: str, key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: also integers of over 4300 digits
        raise _Bad("invalid JSON") from None
    if not isinstance(record, dict):
        raise _Bad("not a JSON object")
    if key not in record:
        raise _Bad(f"missing key {key!r}")
    text = record[key]
    if not isinstance(text, str):
        raise _Bad(f"value of {key!r} not a string")
    try:
        # JSON escapes can spell NUL and lone surrogates, which are no UTF-8 text.
        return _decode(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise _Bad("invalid UTF-8") from None
