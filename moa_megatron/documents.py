"""Readers of documents, which count and locate what they leave out.

`list_files` finds the input, `read_documents` reads it.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_BOM = b"\xef\xbb\xbf"
_LOCATIONS_KEPT = 5


@dataclass(frozen=True)
class SourceFile:
    """An input file; `key` is its path relative to the input it was found in, `size` in bytes."""

    path: Path
    key: str
    size: int


@dataclass(frozen=True)
class Document:
    """`key` decides the split: the relative path of a whole file, the text of a jsonl line."""

    text: str
    key: str
    num_bytes: int


@dataclass
class ReadReport:
    """Counts by kind, with the first `file:line` of each; `skipped` is left out, `noted` is not."""

    skipped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    locations: dict[str, list[str]] = field(default_factory=dict)

    def add(self, counts: Counter[str], kind: str, location: str) -> None:
        counts[kind] += 1
        first = self.locations.setdefault(kind, [])
        if len(first) < _LOCATIONS_KEPT:
            first.append(location)

    def lines(self) -> list[str]:
        """One line a kind: what, how often, where first."""
        return [
            f"{title} {count:,} x {kind}: {', '.join(self.locations[kind])}"
            + (", ..." if count > _LOCATIONS_KEPT else "")
            for title, counts in (("skipped", self.skipped), ("noted", self.noted))
            for kind, count in sorted(counts.items())
        ]


class _Bad(Exception):
    """One line or file that yields no document; `offset` in bytes into it."""

    def __init__(self, kind: str, offset: int = 0) -> None:
        super().__init__(kind)
        self.kind, self.offset = kind, offset


def list_files(inputs: Sequence[Path], suffixes: Sequence[str] = (".py",)) -> list[SourceFile]:
    """The files of all inputs: folders give their files with `suffixes`, sorted by path.

    Hidden folders, `__pycache__` and symbolic links to folders are left out.

    Raises:
        ValueError: every input that is missing, unreadable, of an unknown kind, or empty-handed.
    """
    known = {".jsonl", ".txt", *suffixes}
    files: list[SourceFile] = []
    problems = []
    for source in inputs:
        if source.is_dir():
            found = walk(source, suffixes)
            if not found:
                problems.append(f"input {source}: no {' or '.join(suffixes)} files; see --suffix")
            files.extend(found)
        elif not source.is_file():
            problems.append(f"input {source}: no such file or folder")
        elif source.suffix not in known:
            problems.append(
                f"input {source}: suffix {source.suffix!r} is none of {' '.join(sorted(known))}; "
                f"unpack it, or pass --suffix {source.suffix} to read it as plain text"
            )
        else:
            files.append(SourceFile(source, source.name, source.stat().st_size))
    problems += [f"{f.path}: no read permission" for f in files if not os.access(f.path, os.R_OK)]
    if problems:
        raise ValueError("\n".join(problems))
    return files


def walk(
    root: Path, suffixes: Sequence[str], skip: Callable[[str], bool] = lambda name: False
) -> list[SourceFile]:
    """Files below `root` sorted by key; `skip` says by name which files and folders to leave."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name[0] != "." and name != "__pycache__" and not skip(name)
        ]
        for name in names:
            if name.endswith(tuple(suffixes)) and not skip(name):
                path = Path(folder, name)
                files.append(
                    SourceFile(path, path.relative_to(root).as_posix(), path.stat().st_size)
                )
    return sorted(files, key=lambda file: file.key)


def in_validation(key: str, fraction: float) -> bool:
    """Whether a document is held out: by its key's hash, so in any order, machine and subset."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def read_documents(
    files: Sequence[SourceFile], report: ReadReport, json_key: str = "text", strict: bool = False
) -> Iterator[Document]:
    """Documents in the order of `files`: one a line of a `.jsonl`, one a file of anything else.

    Lines and files that are no UTF-8 text are skipped, counted and located in `report`. Byte order
    marks are stripped. CRLF is kept byte for byte inside texts (in jsonl it may also end a line,
    which belongs to no text). Both are noted in `report`.

    Raises:
        ValueError: with `strict`, after the last document, if anything was skipped.
    """
    for file in files:
        if file.path.suffix == ".jsonl":
            yield from _read_jsonl(file, report, json_key)
        else:
            yield from _read_whole(file, report)
    if strict and report.skipped:
        raise ValueError(
            f"{report.skipped.total():,} bad lines or files, and strict was asked for:\n"
            + "\n".join(report.lines())
        )


def _read_jsonl(file: SourceFile, report: ReadReport, json_key: str) -> Iterator[Document]:
    number = 0
    with file.path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            location = f"{file.path}:{number}"
            if raw.startswith(_BOM):
                report.add(report.noted, "byte order mark stripped", location)
            if raw.endswith(b"\r\n"):
                report.add(report.noted, "CRLF line end", location)
            try:
                text = _json_text(_decode(raw.removeprefix(_BOM)), json_key)
            except _Bad as bad:
                report.add(report.skipped, bad.kind, location)
            else:
                yield Document(text, text, len(raw))
    if number == 0:
        report.add(report.skipped, "empty or blank", f"{file.path}:1")


def _read_whole(file: SourceFile, report: ReadReport) -> Iterator[Document]:
    raw = file.path.read_bytes()
    if raw.startswith(_BOM):
        report.add(report.noted, "byte order mark stripped", f"{file.path}:1")
    if (crlf := raw.find(b"\r\n")) >= 0:
        line = raw.count(b"\n", 0, crlf) + 1
        report.add(report.noted, "file with CRLF line ends, kept", f"{file.path}:{line}")
    body = raw.removeprefix(_BOM)
    try:
        text = _decode(body)
    except _Bad as bad:
        line = body.count(b"\n", 0, bad.offset) + 1
        report.add(report.skipped, bad.kind, f"{file.path}:{line}")
    else:
        yield Document(text, file.key, len(raw))


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
