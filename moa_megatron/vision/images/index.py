"""The index: where every image of a data set lies, its size and its class, as arrays."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WHOLE_FILE = -1  # offset of an image that is a file of its own
_ARRAYS = {
    "container": np.int32, "offset": np.int64, "size": np.int64, "height": np.int32,
    "width": np.int32, "label": np.int64,
}  # fmt: skip


class Names:
    """Strings in one block of bytes: a million file names cost their letters, not 100 MB."""

    def __init__(self, block: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.block, self.ends = block, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """The names, which need not be valid Unicode."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> str:
        begin = self.ends[row - 1] if row else 0
        return os.fsdecode(self.block[begin : self.ends[row]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


@dataclass(frozen=True)
class ImageIndex:
    """The good images of a data set, one row each, and the bad ones by name.

    Args:
        containers: absolute paths: folders of image files, or shards.
        relative: the same as they are called within the inputs; '' for folder trees.
        container: [n], which of them.
        offset: [n], first byte in the shard; `WHOLE_FILE` where the image is a file.
        size: [n], bytes.
        height, width: [n], of the image as decoded, turned as its EXIF orientation says.
        label: [n], class; -1 where a shard does not tell.
        names: [n], of files relative to their folder, of a shard's members.
        class_names: by label; empty where classes are numbers.
        bad: path and reason of what was left out.
        ignored: other files, counted by suffix.
        digest: 12 hex digits over names, sizes and labels, not over where the images lie.
        file: where the index is kept.
    """

    containers: tuple[str, ...]
    relative: tuple[str, ...]
    container: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    label: NDArray[np.int64]
    names: Names
    class_names: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]
    ignored: Counter[str]
    digest: str
    file: Path | None = None

    def __len__(self) -> int:
        return len(self.size)

    def path(self, row: int) -> str:
        """Where an image lies, for people: a file's path, or a shard's and the member."""
        return location(self.containers[self.container[row]], self.names[row], self.offset[row])

    def describe(self) -> str:
        """One line for the log."""
        classes, size = len(np.unique(self.label[self.label >= 0])), int(self.size.sum())
        parts = [
            f"{len(self):,} images",
            f"{classes:,} classes" if classes > 1 else "",
            f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB",
            f"median {np.median(self.width):.0f}x{np.median(self.height):.0f}",
            f"{len(self.bad):,} bad left out" if self.bad else "",
            f"digest {self.digest}",
        ]
        return ", ".join(part for part in parts if part)


def location(container: str, name: str, offset: int) -> str:
    """The path of an image file, or a shard's path and the name of its member."""
    return os.path.join(container, name) if offset == WHOLE_FILE else f"{container}: {name}"


def digest(
    relative: Iterable[str], container: NDArray[Any], names: Names, *columns: NDArray[Any]
) -> str:
    """12 hex digits over what the images are called and hold; where they lie does not matter."""
    state = hashlib.blake2b(json.dumps(list(relative)).encode(), digest_size=6)
    for column in (container, names.block, names.ends, *columns):
        state.update(np.ascontiguousarray(column).tobytes())
    return state.hexdigest()


def save(index: ImageIndex, path: Path) -> None:
    """Writes the index whole or not at all; who writes the same at the same time does no harm.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {name: getattr(index, name) for name in _TOLD}
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as stream:
            np.savez(
                stream, **{name: getattr(index, name) for name in _ARRAYS},
                names=index.names.block, ends=index.names.ends,
                told=np.frombuffer(json.dumps(told).encode(), dtype=np.uint8),
            )  # fmt: skip
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


_TOLD = ("containers", "relative", "class_names", "bad", "ignored", "digest")


def load(path: Path) -> ImageIndex:
    """An index as `save` wrote it.

    Raises:
        OSError, ValueError, KeyError, zipfile.BadZipFile: there is none, or it is damaged.
    """
    with np.load(path, allow_pickle=False) as stored:
        told = json.loads(stored["told"].tobytes())
        return ImageIndex(
            **{name: stored[name].astype(dtype, copy=False) for name, dtype in _ARRAYS.items()},
            names=Names(stored["names"], stored["ends"]),
            containers=tuple(told["containers"]),
            relative=tuple(told["relative"]),
            class_names=tuple(told["class_names"]),
            bad=tuple((name, reason) for name, reason in told["bad"]),
            ignored=Counter(told["ignored"]),
            digest=told["digest"],
            file=path,
        )
