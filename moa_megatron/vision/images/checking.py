"""Can DALI decode an image, and is it RGB? Decided once, for one bad image ends DALI's pipeline.

The header's verdict is Pillow's; whether the pixels are whole is DALI's own, on the whole image:
the windows that training decodes pass over a cut-off JPEG's missing end. Where both decode an
image they give the same bytes, also of grey images and turned ones (tests hold them together).
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from moa_megatron.vision.images.reading import Reader

VERSION = 1  # of these rules: remembered verdicts of another version are not used
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP")  # MPO: a camera's JPEG with more images behind it
MAX_PIXELS = 89_478_485  # a quarter of a gigabyte as RGB, where Pillow begins to warn of bombs
_MODES = {
    "L": "grey",
    "CMYK": "CMYK",
    "P": "palette",
    "PA": "palette",
    "LA": "alpha channel",
    "RGBA": "alpha channel",
    "1": "one bit a pixel",
    "I;16": "16 bits a channel",
}
GREY = _MODES["L"]
_BATCH = 16
_BATCH_PIXELS = 1 << 24  # decoded together: 50 MB

Verdict = tuple[int, int] | str  # height and width, or the reason why not


@dataclass(frozen=True)
class Place:
    """Where an image lies, as `Reader.read` takes it."""

    path: str
    offset: int
    size: int


def check(places: Sequence[Place], grey: bool) -> list[Verdict]:
    """Height and width of each image as decoded, or why it must be left out."""
    verdicts: dict[int, Verdict] = {}
    batch: dict[int, NDArray[np.uint8]] = {}
    pixels = 0
    reader = Reader()
    for number, place in enumerate(places):
        try:
            encoded = reader.read(place.path, place.offset, place.size) if place.size else None
        except OSError as error:
            verdicts[number] = f"unreadable: {error.strerror or error}"
            continue
        header = _header(encoded, grey)
        if encoded is None or isinstance(header, str):
            verdicts[number] = str(header)
            continue
        batch[number] = encoded
        pixels += header
        if len(batch) == _BATCH or pixels > _BATCH_PIXELS:
            verdicts.update(_decoded(batch))
            batch, pixels = {}, 0
    verdicts.update(_decoded(batch))
    return [verdicts[number] for number in range(len(places))]


def _header(encoded: NDArray[np.uint8] | None, grey: bool) -> int | str:
    """The pixels that an image claims to have, or what is wrong with it."""
    if encoded is None:
        return "zero bytes"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded)) as image:
                kind, mode, pixels = image.format, image.mode, image.width * image.height
    except UnidentifiedImageError:
        return "no image"
    except Image.DecompressionBombError:
        return f"over {MAX_PIXELS:,} pixels"
    except Exception as error:  # Pillow's plug-ins raise what they meet in damaged headers
        return f"damaged: {error}"
    if kind not in FORMATS:
        return f"a {kind} file under another name"
    if pixels > MAX_PIXELS:
        return f"over {MAX_PIXELS:,} pixels"
    if mode != "RGB" and not (grey and mode == "L"):
        return _MODES.get(mode, f"mode {mode}")
    return pixels


def _decoded(batch: dict[int, NDArray[np.uint8]]) -> Iterator[tuple[int, Verdict]]:
    """DALI's verdicts; of a batch that fails the halves are decoded, down to the bad image."""
    if not batch:
        return
    try:
        shapes = _pipeline().shapes(list(batch.values()))
    except RuntimeError:
        _pipeline.cache_clear()  # a pipeline that failed is of no use any more
        items = list(batch.items())
        if len(items) == 1:
            yield items[0][0], f"damaged: {_complaint(items[0][1])}"
            return
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            yield from _decoded(dict(half))
        return
    yield from zip(batch, shapes)


def _complaint(encoded: NDArray[np.uint8]) -> str:
    """Pillow's words for it: DALI's name its source code, not the fault."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
    except Exception as error:  # as in _header
        return str(error)
    return "DALI cannot decode it"


class _Pipeline:
    """Decodes whole images on one thread, for their shapes."""

    def __init__(self) -> None:
        from nvidia.dali import fn, pipeline_def, types

        self._batch: list[NDArray[np.uint8]] = []

        @pipeline_def(batch_size=_BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def decoder() -> Any:
            encoded = fn.external_source(lambda: self._batch, dtype=types.UINT8, ndim=1)
            return fn.decoders.image(encoded, output_type=types.RGB)

        self._pipeline = decoder()
        self._pipeline.build()

    def shapes(self, batch: list[NDArray[np.uint8]]) -> list[tuple[int, int]]:
        """Height and width of each.

        Raises:
            RuntimeError: an image cannot be decoded; the object is of no use any more.
        """
        self._batch = batch
        (images,) = self._pipeline.run()
        return [(int(height), int(width)) for height, width, _ in images.shape()]


@functools.cache
def _pipeline() -> _Pipeline:
    return _Pipeline()
