"""The files to read: listed in a fixed order, and cut into slices that workers share."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moa_megatron.data import containers

_LINES = (".jsonl", ".json")
_KINDS = {kind + packed for kind in (*_LINES, ".txt") for packed in ("", *containers.COMPRESSIONS)}


@dataclass(frozen=True)
class SourceFile:
    """An input file; `key` is its path relative to the input it was found in, `size` in bytes."""

    path: Path
    key: str
    size: int

    @property
    def has_lines(self) -> bool:
        """Whether every line is a document, not the whole file."""
        return Path(_unpacked(self.path)).suffix in _LINES

    @property
    def can_be_cut(self) -> bool:
        return self.has_lines and not containers.compression(self.path)


@dataclass(frozen=True)
class Slice:
    """The lines of a file whose first byte lies in [start, end), counted in bytes."""

    file: SourceFile
    start: int
    end: int


def list_files(inputs: Sequence[Path], suffixes: Sequence[str] = (".py",)) -> list[SourceFile]:
    """The files of all inputs: folders give their files with `suffixes`, sorted by path.

    Hidden folders, `__pycache__` and symbolic links to folders are left out.

    Raises:
        ValueError: every input that is missing, unreadable, of an unknown kind, or empty-handed.
    """
    known = {*_KINDS, *suffixes}
    files: list[SourceFile] = []
    problems = []
    for source in inputs:
        if source.is_dir():
            try:
                found = walk(source, suffixes)
            except ValueError as error:
                problems.append(str(error))
                continue
            if not found:
                problems.append(f"input {source}: no {' or '.join(suffixes)} files; see --suffix")
            files.extend(found)
        elif not source.is_file():
            problems.append(f"input {source}: no such file or folder")
        elif _kind(source) not in known and source.suffix not in suffixes:
            problems.append(
                f"input {source}: suffix {_kind(source)!r} is none of {' '.join(sorted(known))}; "
                f"unpack it, or pass --suffix {source.suffix} to read it as plain text"
            )
        else:
            files.append(SourceFile(source, source.name, source.stat().st_size))
    named_once: set[Path] = set()
    for file in files:
        if (path := file.path.resolve()) in named_once:
            problems.append(f"{file.path}: named twice; its documents would be there twice")
        named_once.add(path)
    problems += [f"{f.path}: no read permission" for f in files if not os.access(f.path, os.R_OK)]
    for package in sorted({p for f in files if (p := containers.missing_package(f.path))}):
        named = next(f.path for f in files if containers.missing_package(f.path) == package)
        problems.append(f"{named}: needs the package {package}; pip install {package}")
    if problems:
        raise ValueError("\n".join(problems))
    return files


def walk(
    root: Path, suffixes: Sequence[str], skip: Callable[[str], bool] = lambda name: False
) -> list[SourceFile]:
    """Files below `root` sorted by key; `skip` says by name which files and folders to leave.

    Raises:
        ValueError: every folder and file that cannot be read, such as a broken link.
    """
    files = []
    unread: list[OSError] = []
    for folder, folders, names in os.walk(root, onerror=unread.append):
        folders[:] = [
            name for name in folders if name[0] != "." and name != "__pycache__" and not skip(name)
        ]
        for name in names:
            if name.endswith(tuple(suffixes)) and not skip(name):
                path = Path(folder, name)
                try:
                    size = path.stat().st_size
                except OSError as error:
                    unread.append(error)
                    continue
                files.append(SourceFile(path, path.relative_to(root).as_posix(), size))
    if unread:
        raise ValueError(
            "\n".join(f"{e.filename}: {e.strerror}; make it readable or remove it" for e in unread)
        )
    return sorted(files, key=lambda file: file.key)


def _unpacked(path: Path) -> str:
    """The name without the suffix of its compression."""
    return path.name.removesuffix(containers.compression(path))


def _kind(path: Path) -> str:
    return Path(_unpacked(path)).suffix + containers.compression(path)
