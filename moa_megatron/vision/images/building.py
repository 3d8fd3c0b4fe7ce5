"""Builds the index: lists the images, checks every one in parallel, and remembers the result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moa_megatron.recipes import RefusedError
from moa_megatron.vision.images import checking, formats, index
from moa_megatron.vision.images.index import ImageIndex, Names
from moa_megatron.vision.images.listing import Listing, listed
from moa_megatron.vision.images.processes import mapping

logger = logging.getLogger(__name__)

_CHUNK = 128  # images that a process checks at a time
_SHOWN = 10  # bad images that a message names


def build(
    inputs: Sequence[Path],
    cache_dir: Path,
    *,
    grey: bool = False,
    max_bad_fraction: float = 0.01,
    workers: int | None = None,
    progress: bool = True,
) -> ImageIndex:
    """The index of some inputs, as remembered in `cache_dir` or built anew.

    Args:
        inputs: folder trees, .tar and TFRecord files, or folders of those (`formats.scan`).
        cache_dir: of the indices; beside each one stands the list of its bad images.
        grey: take grey images, too; DALI makes RGB of them.
        max_bad_fraction: of all images that may be bad.
        workers: processes, by default one for each core; 1 means this process.
        progress: draw a bar on stderr.

    Raises:
        RefusedError: an input is not what it should be, or too many images are bad.
        OSError: the cache cannot be written.
        RuntimeError: a worker process was killed.
    """
    sources = formats.scan(inputs)
    path = _path(sources, cache_dir, grey)
    found = _remembered(path)
    bad_list = path.with_suffix(".bad.txt")
    if found is None:
        found = _built(sources, grey, workers or len(os.sched_getaffinity(0)), progress)
        index.save(found, path)
        found = dataclasses.replace(found, file=path)
        if found.bad:
            _list_bad(found, bad_list)
    if found.bad:
        _judge(found, bad_list, max_bad_fraction)
    return found


def remembered(inputs: Sequence[Path], cache_dir: Path, grey: bool = False) -> ImageIndex | None:
    """What `build` has written for some inputs, or None where it would build it anew.

    Raises:
        RefusedError: an input is not what it should be.
    """
    return _remembered(_path(formats.scan(inputs), cache_dir, grey))


def _path(sources: Sequence[formats.Source], cache_dir: Path, grey: bool) -> Path:
    return cache_dir / f"images-{_fingerprint(sources, grey)}.npz"


def _fingerprint(sources: Sequence[formats.Source], grey: bool) -> str:
    state = hashlib.blake2b(json.dumps([checking.VERSION, grey]).encode(), digest_size=8)
    for source in sources:
        state.update(os.fsencode(f"\n{source.root}\0{source.is_tree}\0"))
        for file in source.files:
            state.update(os.fsencode(f"{file.name}\0{file.size}\0{file.mtime_ns}\0"))
    return state.hexdigest()


def _remembered(path: Path) -> ImageIndex | None:
    if not path.exists():
        return None
    try:
        return index.load(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s: damaged (%s); it is built anew", path, error)
        return None


def _built(
    sources: Sequence[formats.Source], grey: bool, workers: int, progress: bool
) -> ImageIndex:
    verdicts: list[checking.Verdict] = []
    with mapping(workers) as mapped:
        listing = listed(sources, mapped, progress)
        total = len(listing.members)
        with tqdm(total=total, unit=" images", desc="checking", disable=not progress) as bar:
            try:
                for some in mapped(checking.check, _chunks(listing.places(), grey)):
                    verdicts += some
                    bar.update(len(some))
            except BrokenProcessPool as error:
                names = [member.name for member in listing.members[len(verdicts) :]]
                raise RuntimeError(
                    f"a process that checks images was killed, perhaps for want of memory, at or "
                    f"after {names[0]}; repeat with fewer workers"
                ) from error
    return _assembled(listing, verdicts)


def _chunks(
    places: Iterable[checking.Place], grey: bool
) -> Iterator[tuple[list[checking.Place], bool]]:
    chunk: list[checking.Place] = []
    for place in places:
        chunk.append(place)
        if len(chunk) == _CHUNK:
            yield chunk, grey
            chunk = []
    if chunk:
        yield chunk, grey


def _assembled(listing: Listing, verdicts: Sequence[checking.Verdict]) -> ImageIndex:
    labels, class_names = listing.labels()
    good = [row for row, verdict in enumerate(verdicts) if not isinstance(verdict, str)]
    members = [listing.members[row] for row in good]
    shapes = np.array([verdicts[row] for row in good], dtype=np.int32).reshape(-1, 2)
    container = np.array(listing.container, dtype=np.int32)[good]
    size = np.array([member.size for member in members], dtype=np.int64)
    label = np.array(labels, dtype=np.int64)[good]
    names = Names.of(member.name for member in members)
    bad = [
        (index.location(listing.containers[container], member.name, member.offset), verdict)
        for container, member, verdict in zip(listing.container, listing.members, verdicts)
        if isinstance(verdict, str)
    ]
    return ImageIndex(
        containers=tuple(listing.containers),
        relative=tuple(listing.relative),
        container=container,
        offset=np.array([member.offset for member in members], dtype=np.int64),
        size=size,
        height=np.ascontiguousarray(shapes[:, 0]),
        width=np.ascontiguousarray(shapes[:, 1]),
        label=label,
        names=names,
        class_names=class_names,
        bad=tuple(bad),
        ignored=listing.ignored,
        digest=index.digest(listing.relative, container, names, size, label),
    )


def _list_bad(found: ImageIndex, path: Path) -> None:
    """Writes the list of bad images, one a line: path, tabulator, reason."""
    text = "".join(f"{name}\t{reason}\n" for name, reason in found.bad)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    partial.write_text(text, errors="surrogateescape")
    os.replace(partial, path)


def bad_by_reason(found: ImageIndex) -> Counter[str]:
    """How many images were left out for what; details of single ones are dropped."""
    return Counter(reason.partition(":")[0] for _, reason in found.bad)


def _judge(found: ImageIndex, bad_list: Path, max_bad_fraction: float) -> None:
    """Logs what was left out, or refuses it.

    Raises:
        RefusedError: more than the allowed fraction is bad, or nothing is left.
    """
    reasons = bad_by_reason(found)
    total = len(found) + len(found.bad)
    examples = [f"  {name}: {reason}" for name, reason in found.bad[:_SHOWN]]
    told = f"{len(found.bad):,} of {total:,} images are bad ({formats.counted(reasons)})"
    if len(found) and len(found.bad) <= max_bad_fraction * total:
        logger.warning(
            "%s and left out, such as\n%s\nall of them: %s", told, "\n".join(examples[:3]), bad_list
        )
        return
    cures = ["remove or repair them"]
    if len(found):
        fraction = math.ceil(1000 * len(found.bad) / total) / 1000
        cures.append(f"allow more with --moa-max-bad-images {fraction:g}")
    if reasons[checking.GREY] > len(found.bad) / 2:
        cures.append("take grey ones as they are with --moa-grey-images")
    raise RefusedError(
        "\n".join(
            [
                f"{told}, more than the {max_bad_fraction:.2%} that --moa-max-bad-images allows:",
                *examples,
                f"all of them: {bad_list}",
                f"{'; or '.join(cures)}",
            ]
        )
    )
