"""Compressed files as streams: flat memory, several members or frames as one, damage located."""

import io
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

COMPRESSIONS = (".gz", ".zst")
_GZIP = 31  # zlib's window bits for a gzip header and trailer
# What one read of the compressed side may expand to: 1,032-fold in gzip, some 32,000-fold in zstd.
_CHUNK = {".gz": 1 << 16, ".zst": 1 << 12}
_BUFFER = 1 << 20


class DamagedError(Exception):
    """A compressed file that is cut, corrupt, or followed by something else."""


def compression(path: Path) -> str:
    """``.gz``, ``.zst``, or an empty string for a plain file."""
    return path.suffix if path.suffix in COMPRESSIONS else ""


def missing_package(path: Path) -> str | None:
    """The package that reading this file needs and that is not installed."""
    return "zstandard" if path.suffix == ".zst" and find_spec("zstandard") is None else None


class Source:
    """An input file opened for reading; a context manager.

    `stream` gives the decompressed bytes and raises `DamagedError` where they end too early;
    `consumed` counts the bytes of the file itself, compressed where it is.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=_BUFFER)
        kind = compression(path)
        self._decompressed = _Decompressed(self._file, kind) if kind else None
        self.stream: BinaryIO = (
            io.BufferedReader(self._decompressed, _BUFFER) if self._decompressed else self._file
        )

    @property
    def consumed(self) -> int:
        return self._decompressed.consumed if self._decompressed else self._file.tell()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class _Decompressed(io.RawIOBase):
    """All members of a gzip file, or all frames of a zstd file, one after the other."""

    def __init__(self, file: BinaryIO, kind: str) -> None:
        self._file, self._kind, self.consumed = file, kind, 0
        self._new, self._error = _decoder(kind)
        self._decoder: Any = None  # of the member that is being read
        self._rest = b""  # read, and belonging to the next member
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._next_chunk()
            if not chunk:
                if self._decoder is not None:
                    raise DamagedError(f"cut after compressed byte {self.consumed:,}")
                return 0
            self._decode(chunk)
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _next_chunk(self) -> bytes:
        while True:
            chunk, self._rest = self._rest, b""
            if not chunk:
                chunk = self._file.read(_CHUNK[self._kind])
                self.consumed += len(chunk)
                if not chunk:
                    return b""
            if self._decoder is None and self._kind == ".gz":
                chunk = chunk.lstrip(b"\0")  # padding between members, as of tapes
            if chunk:
                return chunk

    def _decode(self, chunk: bytes) -> None:
        if self._decoder is None:
            self._decoder = self._new()
        try:
            self._ready = memoryview(self._decoder.decompress(chunk))
        except self._error as error:
            raise DamagedError(f"corrupt before compressed byte {self.consumed:,}") from error
        if self._decoder.eof:
            self._rest, self._decoder = self._decoder.unused_data, None


def _decoder(kind: str) -> tuple[Callable[[], Any], type[Exception]]:
    if kind == ".gz":
        return lambda: zlib.decompressobj(_GZIP), zlib.error
    # Imported where such a file is read: only those need it.
    import zstandard  # type: ignore[import-not-found]

    # zstd --long=31 makes windows that the default refuses.
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return context.decompressobj, zstandard.ZstdError
