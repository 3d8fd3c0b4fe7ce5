"""The work of preparing data, cut into parts that survive a kill and that processes share.

`PREFIX.parts/` holds `plan.json` (what is prepared from which files with which tokenizer) and for
each finished part its tokens and lengths by split and, written last, its record. The parts' order
is that of the input, so neither their size nor the number of workers shows in the output.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moa_megatron.data.documents import (
    Document,
    Location,
    ReadReport,
    in_validation,
    read_slice,
)
from moa_megatron.data.encoding import TextEncoder
from moa_megatron.data.inputs import Slice, SourceFile
from moa_megatron.data.token_files import token_dtype
from moa_megatron.data.tokenization import write_text

_FORMAT = 2
_BATCH_BYTES = 1 << 20
# The tokenizer, and the configuration that names its end of document.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

type Part = list[Slice]


@dataclass(frozen=True)
class Options:
    """What decides the output, apart from the files and the tokenizer."""

    json_key: str = "text"
    split_valid: float = 0.0
    append_eod: bool = True
    max_line_bytes: int = 64 << 20
    part_bytes: int = 256 << 20

    @property
    def splits(self) -> tuple[str, ...]:
        """The one of an unsplit run has the empty name."""
        return ("valid", "train") if self.split_valid else ("",)


@dataclass
class Record:
    """What one part holds: by split documents, tokens and bytes of text; and what was left out."""

    documents: Counter[str]
    tokens: Counter[str]
    num_bytes: Counter[str]
    report: ReadReport

    def dump(self) -> str:
        return json.dumps({**vars(self), "report": vars(self.report)})

    @classmethod
    def load(cls, path: Path) -> "Record":
        state = json.loads(path.read_text(encoding="utf-8"))
        report = ReadReport(**state["report"])
        report.skipped, report.noted = Counter(report.skipped), Counter(report.noted)
        report.locations = {
            kind: [Location(*at) for at in found] for kind, found in report.locations.items()
        }
        documents, tokens, num_bytes = (
            Counter(state[key]) for key in ("documents", "tokens", "num_bytes")
        )
        return cls(documents, tokens, num_bytes, report)


def cut(files: Sequence[SourceFile], part_bytes: int) -> list[Part]:
    """Parts in the order of the files: small files together, large plain JSON lines in slices."""
    parts: list[Part] = []
    size = 0  # of the last part
    for file in files:
        step = part_bytes if file.can_be_cut else max(file.size, 1)
        for start in range(0, max(file.size, 1), step):
            piece = Slice(file, start, min(start + step, file.size))
            if not parts or _is_cut(piece) or size + piece.end - piece.start > part_bytes:
                parts.append([])
                size = 0
            parts[-1].append(piece)
            # A slice of a cut file stays alone, so that its record counts its lines.
            size += part_bytes if _is_cut(piece) else piece.end - piece.start
    return parts


def _is_cut(piece: Slice) -> bool:
    return piece.end - piece.start < piece.file.size


class Workplace:
    """The folder `PREFIX.parts`: the plan and the finished parts of one preparation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int, split: str, kind: str) -> Path:
        return self.folder / f"{number:06d}{'-' * bool(split)}{split}.{kind}"

    def load(self, number: int, options: Options, itemsize: int) -> Record | None:
        """The record of a part that is complete, sizes included; else None."""
        try:
            record = Record.load(self.path(number, "", "json"))
            for split in options.splits:
                sizes = {"tokens": itemsize * record.tokens[split]}
                sizes["lengths"] = 4 * record.documents[split]
                for kind, size in sizes.items():
                    if self.path(number, split, kind).stat().st_size != size:
                        return None
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return record

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out.

        Raises:
            ValueError: another process prepares the same output.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.folder}: another process is preparing this") from None
            except OSError:
                pass  # a file system without locks
            yield

    def adopt(self, plan: dict[str, Any]) -> None:
        """Begin this plan, or go on with it.

        Raises:
            ValueError: the folder holds parts of another plan; names every difference.
        """
        try:
            old = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.clear()  # parts without their plan say nothing
            write_text(self.folder / "plan.json", json.dumps(plan, indent=1) + "\n")
            return
        if old != plan:
            raise ValueError(
                f"{self.folder}: holds parts of another command; pass --overwrite to start anew, "
                "or repeat that command:\n" + "\n".join(changes(old, plan))
            )

    def unfinished(self) -> bool:
        """Whether an earlier run has left something to go on with."""
        return (self.folder / "plan.json").is_file()

    def tokenizer(self) -> str | None:
        """sha256 of the tokenizer that the parts are made with, once that is decided."""
        path = self.folder / "tokenizer.sha256"
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None

    def settle_tokenizer(self, sha256: str) -> None:
        """Raises ValueError if the parts are of another tokenizer."""
        before = self.tokenizer()
        if before is None:
            write_text(self.folder / "tokenizer.sha256", sha256 + "\n")
        elif before != sha256:
            raise ValueError(
                f"{self.folder}: its parts are made with another tokenizer (sha256 {before[:12]} "
                f"then, {sha256[:12]} now); pass --overwrite to start anew"
            )

    def clear(self) -> None:
        """Forget the plan and all parts; the lock stays."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        (self.folder / "plan.json").unlink(missing_ok=True)  # first: see `adopt`
        shutil.rmtree(self.folder, ignore_errors=True)


def make_plan(files: Sequence[SourceFile], options: Options, **more: object) -> dict[str, Any]:
    """What two runs must have in common to share parts, the tokenizer aside."""
    return {
        "format": _FORMAT,
        **dataclasses.asdict(options),
        **more,
        "files": [
            [str(f.path.absolute()), f.key, f.size, f.path.stat().st_mtime_ns] for f in files
        ],
    }


def tokenizer_sha256(tokenizer_dir: Path) -> str:
    """Of the files that decide ids."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = tokenizer_dir / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two plans, a line each."""
    names = [name for name in {**old, **new} if name != "files"]
    lines = [
        f"  {name}: {old.get(name)} then, {new.get(name)} now"
        for name in names
        if old.get(name) != new.get(name)
    ]
    if old.get("format") != new["format"]:
        return lines  # its files may be listed in another way
    listed, given = old["files"], new["files"]
    before, now = ({path: rest for path, *rest in files} for files in (listed, given))
    for path in sorted({**before, **now}):
        if before.get(path) == now.get(path):
            continue
        what = "not given now" if path not in now else "new" if path not in before else "changed"
        lines.append(f"  input {path}: {what}")
    if listed != given and before == now:
        lines.append("  input files: in another order")
    return lines


def process(
    part: Part, number: int, workplace: Workplace, encoder: TextEncoder, options: Options,
    on_bytes: Callable[[int], None],
) -> None:  # fmt: skip
    """Tokenize one part and write its files, record last.

    `on_bytes` gets the bytes of input read since its last call.

    Raises:
        ValueError: an id beyond the vocabulary.
        OSError: a file cannot be read or written.
    """
    record, told = Record(Counter(), Counter(), Counter(), ReadReport()), 0
    report = record.report
    dtype = token_dtype(encoder.vocab_size)
    outputs: dict[str, tuple[BinaryIO, BinaryIO]] = {}
    for split in options.splits:
        paths = (workplace.path(number, split, kind) for kind in ("tokens", "lengths"))
        first, second = (path.open("wb") for path in paths)
        outputs[split] = first, second
    for split, batch in _batches(part, options, report):
        ids, lengths = encoder.encode_all([document.text for document in batch])
        tokens_out, lengths_out = outputs[split]
        tokens_out.write(ids.astype(dtype).tobytes())
        lengths_out.write(lengths.tobytes())
        text_bytes = sum(len(document.text.encode()) for document in batch)
        record.documents[split] += len(batch)
        record.tokens[split] += len(ids)
        record.num_bytes[split] += text_bytes
        on_bytes(report.num_bytes - told)
        told = report.num_bytes
    on_bytes(report.num_bytes - told)
    for pair in outputs.values():
        for stream in pair:
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
    write_text(workplace.path(number, "", "json"), record.dump())


def _batches(
    part: Part, options: Options, report: ReadReport
) -> Iterator[tuple[str, list[Document]]]:
    """Documents of a part by split, in batches: calls into the encoder cost less so."""
    waiting: dict[str, list[Document]] = {split: [] for split in options.splits}
    sizes: Counter[str] = Counter()
    for piece in part:
        for document in read_slice(piece, report, options.json_key, options.max_line_bytes):
            split = ""
            if options.split_valid:
                held_out = in_validation(document.key, options.split_valid)
                split = "valid" if held_out else "train"
            waiting[split].append(document)
            sizes[split] += document.num_bytes
            if sizes[split] >= _BATCH_BYTES:
                yield split, waiting[split]
                waiting[split], sizes[split] = [], 0
    yield from ((split, batch) for split, batch in waiting.items() if batch)
