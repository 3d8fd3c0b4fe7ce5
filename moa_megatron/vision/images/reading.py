"""Reading encoded images from files and from anywhere in shards."""

from __future__ import annotations

import functools
import os

import numpy as np
from numpy.typing import NDArray

from moa_megatron.vision.images.index import WHOLE_FILE

_OPEN_SHARDS = 64  # descriptors a reader keeps; Linux allows a process 1,024


class ChangedError(OSError):
    """An image has another size than when it was indexed."""


class _Descriptor:
    """Closes itself with its last user, who may be reading when the cache lets it go."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Reader:
    """Reads images; any number of threads may share one."""

    def __init__(self) -> None:
        self._shard = functools.lru_cache(maxsize=_OPEN_SHARDS)(_Descriptor)

    def read(self, path: str, offset: int, size: int) -> NDArray[np.uint8]:
        """The encoded bytes of an image, [size].

        Args:
            path: of the shard, or of the image where `offset` is `WHOLE_FILE`.
            offset: of the first byte.
            size: that the index knows.

        Raises:
            OSError: the file cannot be read.
            ChangedError: it is shorter than `size`, or a whole file has another size.
        """
        if offset == WHOLE_FILE:
            file = _Descriptor(path)
            if (now := os.fstat(file.number).st_size) != size:
                raise ChangedError(f"{now:,} bytes long, {size:,} when it was indexed")
            offset = 0
        else:
            file = self._shard(path)
        buffer = np.empty(size, dtype=np.uint8)
        done = 0
        while done < size:
            count = os.preadv(file.number, [memoryview(buffer)[done:]], offset + done)
            if not count:
                raise ChangedError(f"ends {size - done:,} bytes before the index says")
            done += count
        return buffer
