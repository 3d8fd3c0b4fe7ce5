"""The images of folder trees, webdataset tars and TFRecords: where the bytes of each one lie.

Nothing is decoded here. A folder tree is listed by names alone; of shards the members are found by
`shards.members`, and only names, sizes and times of the shards themselves are needed to know
whether a remembered index is still good.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moa_megatron.recipes import RefusedError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
UNREADABLE = -1  # size of a file that cannot be asked for it
_PACKED = (".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".lz4")
_TFRECORD = re.compile(r"\.tfrecords?$|-\d{5}-of-\d{5}$")
_THREADS = 8  # folders of a network file system answer one by one


@dataclass(frozen=True)
class File:
    """A file below the root of its source; `size` in bytes, `UNREADABLE` for a broken link."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Source:
    """One input: a folder tree of image files, or shards that hold images.

    Args:
        root: the folder that names are relative to.
        is_tree: whether `files` are images themselves.
        files: sorted by name.
        ignored: what was left out, counted by suffix.
    """

    root: Path
    is_tree: bool
    files: tuple[File, ...]
    ignored: Counter[str]


def scan(inputs: Sequence[Path]) -> list[Source]:
    """What the inputs hold: each a folder tree, a .tar or TFRecord file, or a folder of those.

    A folder that directly holds shards is read as a folder of shards; its other files are ignored.
    Links are followed, hidden files ignored.

    Raises:
        RefusedError: every input that is missing, empty, named twice, packed or of another kind.
    """
    sources: list[Source] = []
    problems: list[str] = [] if inputs else ["no images: name at least one input"]
    seen: set[Path] = set()
    for path in inputs:
        if path.resolve() in seen:
            problems.append(f"{path}: named twice; its images would be there twice")
        seen.add(path.resolve())
        try:
            sources.append(_source(path.absolute()))
        except RefusedError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{error.filename or path}: {error.strerror}; make it readable")
    if problems:
        raise RefusedError("\n".join(problems))
    return sources


def is_tar(name: str) -> bool:
    """Whether a file of this name is read as a webdataset shard; others are TFRecords."""
    return name.lower().endswith(".tar")


def suffix(name: str) -> str:
    """The suffix in lower case, for counts of what was ignored."""
    return os.path.splitext(name)[1].lower() or "no suffix"


def _source(path: Path) -> Source:
    if path.is_file():
        if _is_packed(path.name):
            raise RefusedError(_packed([path]))
        if not _is_shard(path.name):
            raise RefusedError(
                f"{path}: neither a folder, a .tar nor a TFRecord (*.tfrecord, *-00000-of-01024)"
            )
        return Source(path.parent, False, (_stat(path, path.name),), Counter())
    if not path.is_dir():
        raise RefusedError(f"{path}: no such file or folder")
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    names = [name for name in names if name[0] != "."]
    if packed := [path / name for name in names if _is_packed(name)]:
        raise RefusedError(_packed(packed))
    if shards := [name for name in names if _is_shard(name)]:
        ignored = Counter(suffix(name) for name in names if not _is_shard(name))
        return Source(path, False, tuple(_stat(path / name, name) for name in shards), ignored)
    files, ignored = _tree(path)
    if not files:
        raise RefusedError(
            f"{path}: holds no images ({' '.join(sorted(SUFFIXES))}) and no shards (.tar, "
            f"TFRecord){'; ' + counted(ignored) + ' were ignored' if ignored else ''}"
        )
    return Source(path, True, tuple(files), ignored)


def _is_shard(name: str) -> bool:
    return is_tar(name) or bool(_TFRECORD.search(name))


def _is_packed(name: str) -> bool:
    stem, last = os.path.splitext(name.lower())
    return last in _PACKED and (last.startswith(".t") or _is_shard(stem))


def _packed(paths: Sequence[Path]) -> str:
    listed = ", ".join(str(path) for path in paths[:10])
    return f"{listed}: compressed; images are read from anywhere in a shard, so unpack it"


def counted(counts: Counter[str], limit: int = 6) -> str:
    """Such as `12 .txt, 3 .json`, the most frequent first."""
    shown = [f"{count:,} {name}" for name, count in counts.most_common(limit)]
    return ", ".join(shown + (["..."] if len(counts) > limit else []))


def _stat(path: Path | str, name: str) -> File:
    try:
        status = os.stat(path)
    except OSError:
        return File(name, UNREADABLE, 0)
    return File(name, status.st_size, status.st_mtime_ns)


def _tree(root: Path) -> tuple[list[File], Counter[str]]:
    with os.scandir(root) as entries:
        visible = [entry for entry in entries if entry.name[0] != "."]
    files, ignored = _images(root, [entry for entry in visible if not entry.is_dir()], "")
    folders = [entry.name for entry in visible if entry.is_dir()]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _walk(root, name, frozenset()), folders)
        for more, others in found:
            files += more
            ignored += others
    return sorted(files, key=lambda file: file.name), ignored


def _walk(root: Path, name: str, above: frozenset[str]) -> tuple[list[File], Counter[str]]:
    """The images below a folder; `above` breaks the circles that links can form."""
    folder = root / name
    above |= {os.path.realpath(folder)}
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if entry.name[0] != "."]
    files, ignored = _images(root, [entry for entry in visible if not entry.is_dir()], name + "/")
    for entry in visible:
        if entry.is_dir() and os.path.realpath(entry.path) not in above:
            more, others = _walk(root, name + "/" + entry.name, above)
            files += more
            ignored += others
    return files, ignored


def _images(
    root: Path, entries: Iterable[os.DirEntry[str]], prefix: str
) -> tuple[list[File], Counter[str]]:
    files: list[File] = []
    ignored: Counter[str] = Counter()
    for entry in entries:
        if (kind := suffix(entry.name)) in SUFFIXES:
            files.append(_stat(entry.path, prefix + entry.name))
        else:
            ignored[kind] += 1
    return files, ignored
