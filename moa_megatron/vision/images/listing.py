"""All images of the inputs before they are checked, shards opened by several processes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from moa_megatron.recipes import RefusedError
from moa_megatron.vision.images import formats, shards
from moa_megatron.vision.images.checking import Place
from moa_megatron.vision.images.index import WHOLE_FILE
from moa_megatron.vision.images.processes import Map


@dataclass
class Listing:
    """Images in the order of the inputs; `container` numbers the `containers` for each."""

    containers: list[str] = field(default_factory=list)
    relative: list[str] = field(default_factory=list)
    container: list[int] = field(default_factory=list)
    members: list[shards.Member] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def add(self, path: Path, relative: str, members: Sequence[shards.Member]) -> None:
        """Appends a container, called `relative` within its input, and what it holds."""
        self.container += [len(self.containers)] * len(members)
        self.containers.append(str(path))
        self.relative.append(relative)
        self.members += members

    def places(self) -> Iterator[Place]:
        """Where the bytes of each image lie."""
        for container, member in zip(self.container, self.members):
            path = self.containers[container]
            if member.offset == WHOLE_FILE:
                path = os.path.join(path, member.name)
            yield Place(path, member.offset, member.size)

    def labels(self) -> tuple[list[int], tuple[str, ...]]:
        """Labels and what they are called.

        Numbers stay what they are, -1 where there is none. Once a class is known by name, labels
        count the sorted names of all classes, numbers and '' for none among them.
        """
        told = [member.label for member in self.members]
        if not any(isinstance(label, str) for label in told):
            return [-1 if label is None else int(label) for label in told], ()
        called = ["" if label is None else str(label) for label in told]
        names = sorted(set(called))
        numbers = {name: number for number, name in enumerate(names)}
        return [numbers[name] for name in called], tuple(names)


def listed(sources: Sequence[formats.Source], mapped: Map, progress: bool) -> Listing:
    """The images of some sources.

    Raises:
        RefusedError: every shard that is damaged or of another kind, or there is no image at all.
    """
    listing, problems = Listing(), []
    paths = [s.root / file.name for s in sources if not s.is_tree for file in s.files]
    opened = mapped(_members, ((path,) for path in paths))
    bar = tqdm(total=len(paths), unit=" shards", desc="listing", disable=not (progress and paths))
    with bar:
        for source in sources:
            listing.ignored += source.ignored
            if source.is_tree:
                listing.add(source.root, "", [_file_member(file) for file in source.files])
                continue
            for file in source.files:
                found, ignored = next(opened)
                bar.update()
                if isinstance(found, str):
                    problems.append(found)
                else:
                    listing.add(source.root / file.name, file.name, found)
                    listing.ignored += ignored
    if not listing.members and not problems:
        problems.append(
            f"{', '.join(map(str, paths))}: no images ({' '.join(sorted(formats.SUFFIXES))}), "
            f"only {formats.counted(listing.ignored) or 'nothing'}"
        )
    if problems:
        raise RefusedError("\n".join(problems))
    return listing


def _file_member(file: formats.File) -> shards.Member:
    folder, separator, _ = file.name.partition("/")
    label = folder if separator else ""
    return shards.Member(file.name, WHOLE_FILE, file.size, label)


def _members(path: Path) -> tuple[list[shards.Member] | str, Counter[str]]:
    """As `shards.members`, but errors are a result, so that all can be told at once."""
    try:
        return shards.members(path)
    except RefusedError as error:
        return str(error), Counter()
    except OSError as error:
        return f"{path}: {error.strerror or error}; make it readable", Counter()
