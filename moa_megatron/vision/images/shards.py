"""The images inside a shard: member by member of a .tar, record by record of a TFRecord file."""

from __future__ import annotations

import functools
import os
import posixpath
import struct
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moa_megatron.recipes import RefusedError
from moa_megatron.vision.images import formats

_IMAGE, _LABEL = "image/encoded", "image/class/label"  # as TensorFlow's data-set scripts write them
_LENGTH = struct.Struct("<QI")  # of a record: its bytes, their masked CRC-32C
_CRC_BYTES = 4  # of a record's own checksum, behind it


@dataclass(frozen=True)
class Member:
    """An image in a shard: its bytes, and its class as a number or name, None where not told."""

    name: str
    offset: int
    size: int
    label: int | str | None


def members(path: Path) -> tuple[list[Member], Counter[str]]:
    """The images of a shard in the order of the file, and what was ignored by suffix.

    Raises:
        RefusedError: not a tar or TFRecord file, or cut off.
        OSError: it cannot be read.
    """
    return _tar_members(path) if formats.is_tar(path.name) else (_record_members(path), Counter())


def _tar_members(path: Path) -> tuple[list[Member], Counter[str]]:
    images: list[tuple[str, tarfile.TarInfo]] = []
    labels: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header
                folder, base = posixpath.split(member.name)
                if not member.isreg() or base[:1] in ("", "."):
                    continue
                # webdataset's rule: a sample is what shares the name up to the first dot.
                stem, _, extension = base.partition(".")
                key = posixpath.join(folder, stem)
                if "." + extension.lower() in formats.SUFFIXES:
                    images.append((key, member))
                elif extension.lower() == "cls":
                    stream = archive.extractfile(member)
                    labels[key] = stream.read().decode().strip() if stream else ""
                else:
                    ignored["." + extension.lower()] += 1
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path}: not a whole tar file ({error}); copy it anew") from error
    found = [
        Member(image.name, image.offset_data, image.size, _class(labels.get(key)))
        for key, image in images
    ]
    return found, ignored


def _class(text: str | None) -> int | str | None:
    return int(text) if text and text.isdecimal() else text


def _record_members(path: Path) -> list[Member]:
    found = []
    with path.open("rb") as stream:
        for number, (offset, record) in enumerate(_records(path, stream)):
            try:
                features = _example()(record).features.feature
            except Exception as error:  # protobuf's, whose class depends on its backend
                raise RefusedError(
                    f"{path}: record {number} is no tf.train.Example ({error})"
                ) from error
            if _IMAGE not in features or not features[_IMAGE].bytes_list.value:
                raise RefusedError(
                    f"{path}: record {number} has no feature {_IMAGE}; it has "
                    f"{', '.join(sorted(features)) or 'none'}"
                )
            encoded = features[_IMAGE].bytes_list.value[0]
            label = features[_LABEL].int64_list.value if _LABEL in features else ()
            # The first place where these bytes stand serves as well as the one they came from.
            place = offset + record.find(encoded)
            found.append(
                Member(f"record {number}", place, len(encoded), int(label[0]) if label else None)
            )
    return found


def _records(path: Path, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    end, offset = os.fstat(stream.fileno()).st_size, 0
    while offset < end:
        head = stream.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            raise RefusedError(f"{path}: cut off at byte {end:,}; copy it anew")
        length, checksum = _LENGTH.unpack(head)
        if checksum != masked_crc32c(head[:8]):
            raise RefusedError(
                f"{path}: no TFRecord, or damaged: wrong checksum at byte {offset:,}; copy it anew"
            )
        offset += _LENGTH.size
        if offset + length + _CRC_BYTES > end:
            raise RefusedError(f"{path}: cut off at byte {end:,}; copy it anew")
        yield offset, stream.read(length)
        stream.seek(_CRC_BYTES, os.SEEK_CUR)
        offset += length + _CRC_BYTES


@functools.cache
def _example() -> Any:
    """The parser of tf.train.Example; TensorFlow, which has the class, is not needed for it."""
    from google.protobuf import (
        descriptor_pb2,
        descriptor_pool,
        message_factory,
    )

    kind = descriptor_pb2.FieldDescriptorProto
    optional, repeated = kind.LABEL_OPTIONAL, kind.LABEL_REPEATED
    file = descriptor_pb2.FileDescriptorProto(
        name="moa_megatron/example.proto", package="moa_megatron.tfrecord", syntax="proto3"
    )
    package = f".{file.package}."

    def add(message: Any, number: int, name: str, label: int, type: int, of: str = "") -> Any:
        return message.field.add(
            name=name, number=number, label=label, type=type, type_name=package + of if of else None
        )

    add(file.message_type.add(name="BytesList"), 1, "value", repeated, kind.TYPE_BYTES)
    add(file.message_type.add(name="Int64List"), 1, "value", repeated, kind.TYPE_INT64)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name, of in ((1, "bytes_list", "BytesList"), (3, "int64_list", "Int64List")):
        add(feature, number, name, optional, kind.TYPE_MESSAGE, of).oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, 1, "key", optional, kind.TYPE_STRING)
    add(entry, 2, "value", optional, kind.TYPE_MESSAGE, "Feature")
    add(features, 1, "feature", repeated, kind.TYPE_MESSAGE, "Features.FeatureEntry")
    add(
        file.message_type.add(name="Example"),
        1,
        "features",
        optional,
        kind.TYPE_MESSAGE,
        "Features",
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    example = pool.FindMessageTypeByName("moa_megatron.tfrecord.Example")
    return message_factory.GetMessageClass(example).FromString
