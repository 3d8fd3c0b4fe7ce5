"""Small photographs, damaged files, and the three containers that hold the same of them."""

from __future__ import annotations

import functools
import importlib.util
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 60, 48


@functools.cache
def photograph(number: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A piece of one of scikit-learn's two photographs."""
    place = np.random.default_rng(number)
    whole = _whole(("china.jpg", "flower.jpg")[number % 2])
    left, top = place.integers(whole.width - width), place.integers(whole.height - height)
    return whole.crop((left, top, left + width, top + height))


@functools.cache
def _whole(name: str) -> Image.Image:
    spec = importlib.util.find_spec("sklearn")  # importing it takes seconds
    assert spec is not None and spec.origin is not None
    return Image.open(Path(spec.origin).parent / "datasets" / "images" / name).convert("RGB")


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation: int) -> Image.Exif:
    """EXIF data of a camera that was held so."""
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def good(count: int) -> dict[str, bytes]:
    """Photographs by name, of classes 0, 1 and 2."""
    return {f"{n % 3}/{n:03}.jpg": encode(photograph(n)) for n in range(count)}


def bad() -> dict[str, tuple[bytes, str]]:
    """Every kind of bad image by name: its bytes, and how the reason begins."""
    image = photograph(0)
    whole, png, webp = encode(image), encode(image, "PNG"), encode(image, "WEBP")
    huge = bytearray(whole)
    frame = whole.find(b"\xff\xc0")
    huge[frame + 5 : frame + 9] = b"\xff\x00\xff\x00"
    noise = bytearray(png)
    noise[len(noise) // 2] ^= 255
    deep = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))
    progressive = encode(image, progressive=True)
    return {
        "zero.jpg": (b"", "zero bytes"),
        "text.jpg": (b"<html>not found</html>", "no image"),
        "head.jpg": (whole[:100], "damaged"),
        "half.jpg": (whole[: len(whole) // 2], "damaged"),
        "end.jpg": (whole[:-2], "damaged"),
        "progressive.jpg": (progressive[: len(progressive) // 2], "damaged"),
        "half.png": (png[: len(png) // 2], "damaged"),
        "end.png": (png[:-12], "damaged"),
        "noise.png": (bytes(noise), "damaged"),
        "half.webp": (webp[: len(webp) // 2], "damaged"),
        "half.bmp": (encode(image, "BMP")[:1000], "damaged"),
        "bomb.jpg": (bytes(huge), "over"),
        "grey.jpg": (encode(image.convert("L")), "grey"),
        "grey.png": (encode(image.convert("L"), "PNG"), "grey"),
        "cmyk.jpg": (encode(image.convert("CMYK")), "CMYK"),
        "alpha.png": (encode(image.convert("RGBA"), "PNG"), "alpha"),
        "alpha.webp": (encode(image.convert("RGBA").rotate(30), "WEBP"), "alpha"),
        "grey-alpha.png": (encode(image.convert("LA"), "PNG"), "alpha"),
        "palette.png": (encode(image.convert("P"), "PNG"), "palette"),
        "bit.png": (encode(image.convert("1"), "PNG"), "one bit"),
        "deep.png": (encode(deep, "PNG"), "16 bits"),
        "gif.jpg": (encode(image, "GIF"), "a GIF"),
        "tiff.jpg": (encode(image, "TIFF"), "a TIFF"),
    }


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    """A file for each name."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """A webdataset shard; the folder of a name becomes the sample's .cls."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            label, _, base = name.rpartition("/")
            members = {base: data, base.partition(".")[0] + ".json": b"{}"}
            if label:
                members[base.partition(".")[0] + ".cls"] = label.encode()
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def write_records(path: Path, files: dict[str, bytes]) -> Path:
    """A TFRecord file; the folder of a name becomes the feature image/class/label."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        writer = RecordWriter(stream)
        for name, data in files.items():
            label, _, base = name.rpartition("/")
            features = {
                "image/filename": _field(1, _field(1, base.encode())),
                "image/encoded": _field(1, _field(1, data)),
            }
            if label:
                features["image/class/label"] = _field(3, _field(1, _varint(int(label))))
            entries = (_field(1, key.encode()) + _field(2, v) for key, v in features.items())
            writer.write(_field(1, b"".join(_field(1, entry) for entry in entries)))
    return path


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data
