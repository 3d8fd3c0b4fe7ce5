"""Text to training data: readers that count what they leave out, and the embedded default corpus.

`list_files` finds the input, `read_documents` reads it, `build_indexed` writes Megatron's files.
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import sysconfig
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from moa_megatron.tokenization import build_indexed, check_prefix, train_tokenizer, write_text

logger = logging.getLogger(__name__)

_BOM = b"\xef\xbb\xbf"
_LOCATIONS_KEPT = 5

STDLIB_VALID_FRACTION = 0.05
# Part of the cache key: raise it when the same files would give other data.
_STDLIB_FORMAT = 1
_STDLIB_LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload"
}  # fmt: skip
# They hold the paths of the machine that built or installed Python.
_STDLIB_LOCAL = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class SourceFile:
    """An input file; `key` is its path relative to the input it was found in, `size` in bytes."""

    path: Path
    key: str
    size: int


@dataclass(frozen=True)
class Document:
    """`key` decides the split: the relative path of a whole file, the text of a jsonl line."""

    text: str
    key: str
    num_bytes: int


@dataclass
class ReadReport:
    """Counts by kind, with the first `file:line` of each; `skipped` is left out, `noted` is not."""

    skipped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    locations: dict[str, list[str]] = field(default_factory=dict)

    def add(self, counts: Counter[str], kind: str, location: str) -> None:
        counts[kind] += 1
        first = self.locations.setdefault(kind, [])
        if len(first) < _LOCATIONS_KEPT:
            first.append(location)

    def lines(self) -> list[str]:
        """One line a kind: what, how often, where first."""
        return [
            f"{title} {count:,} x {kind}: {', '.join(self.locations[kind])}"
            + (", ..." if count > _LOCATIONS_KEPT else "")
            for title, counts in (("skipped", self.skipped), ("noted", self.noted))
            for kind, count in sorted(counts.items())
        ]


class _Bad(Exception):
    """One line or file that yields no document; `offset` in bytes into it."""

    def __init__(self, kind: str, offset: int = 0) -> None:
        super().__init__(kind)
        self.kind, self.offset = kind, offset


def list_files(inputs: Sequence[Path], suffixes: Sequence[str] = (".py",)) -> list[SourceFile]:
    """The files of all inputs: folders give their files with `suffixes`, sorted by path.

    Hidden folders, `__pycache__` and symbolic links to folders are left out.

    Raises:
        ValueError: every input that is missing, unreadable, of an unknown kind, or empty-handed.
    """
    known = {".jsonl", ".txt", *suffixes}
    files: list[SourceFile] = []
    problems = []
    for source in inputs:
        if source.is_dir():
            found = _walk(source, suffixes)
            if not found:
                problems.append(f"input {source}: no {' or '.join(suffixes)} files; see --suffix")
            files.extend(found)
        elif not source.is_file():
            problems.append(f"input {source}: no such file or folder")
        elif source.suffix not in known:
            problems.append(
                f"input {source}: suffix {source.suffix!r} is none of {' '.join(sorted(known))}; "
                f"unpack it, or pass --suffix {source.suffix} to read it as plain text"
            )
        else:
            files.append(SourceFile(source, source.name, source.stat().st_size))
    problems += [f"{f.path}: no read permission" for f in files if not os.access(f.path, os.R_OK)]
    if problems:
        raise ValueError("\n".join(problems))
    return files


def _walk(
    root: Path, suffixes: Sequence[str], skip: Callable[[str], bool] = lambda name: False
) -> list[SourceFile]:
    """Files below `root` sorted by key; `skip` says by name which files and folders to leave."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name[0] != "." and name != "__pycache__" and not skip(name)
        ]
        for name in names:
            if name.endswith(tuple(suffixes)) and not skip(name):
                path = Path(folder, name)
                files.append(
                    SourceFile(path, path.relative_to(root).as_posix(), path.stat().st_size)
                )
    return sorted(files, key=lambda file: file.key)


def in_validation(key: str, fraction: float) -> bool:
    """Whether a document is held out: by its key's hash, so in any order, machine and subset."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def read_documents(
    files: Sequence[SourceFile], report: ReadReport, json_key: str = "text", strict: bool = False
) -> Iterator[Document]:
    """Documents in the order of `files`: one a line of a `.jsonl`, one a file of anything else.

    Lines and files that are no UTF-8 text are skipped, counted and located in `report`. Byte order
    marks are stripped. CRLF is kept byte for byte inside texts (in jsonl it may also end a line,
    which belongs to no text). Both are noted in `report`.

    Raises:
        ValueError: with `strict`, after the last document, if anything was skipped.
    """
    for file in files:
        if file.path.suffix == ".jsonl":
            yield from _read_jsonl(file, report, json_key)
        else:
            yield from _read_whole(file, report)
    if strict and report.skipped:
        raise ValueError(
            f"{report.skipped.total():,} bad lines or files, and strict was asked for:\n"
            + "\n".join(report.lines())
        )


def _read_jsonl(file: SourceFile, report: ReadReport, json_key: str) -> Iterator[Document]:
    number = 0
    with file.path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            location = f"{file.path}:{number}"
            if raw.startswith(_BOM):
                report.add(report.noted, "byte order mark stripped", location)
            if raw.endswith(b"\r\n"):
                report.add(report.noted, "CRLF line end", location)
            try:
                text = _json_text(_decode(raw.removeprefix(_BOM)), json_key)
            except _Bad as bad:
                report.add(report.skipped, bad.kind, location)
            else:
                yield Document(text, text, len(raw))
    if number == 0:
        report.add(report.skipped, "empty or blank", f"{file.path}:1")


def _read_whole(file: SourceFile, report: ReadReport) -> Iterator[Document]:
    raw = file.path.read_bytes()
    if raw.startswith(_BOM):
        report.add(report.noted, "byte order mark stripped", f"{file.path}:1")
    if (crlf := raw.find(b"\r\n")) >= 0:
        line = raw.count(b"\n", 0, crlf) + 1
        report.add(report.noted, "file with CRLF line ends, kept", f"{file.path}:{line}")
    body = raw.removeprefix(_BOM)
    try:
        text = _decode(body)
    except _Bad as bad:
        line = body.count(b"\n", 0, bad.offset) + 1
        report.add(report.skipped, bad.kind, f"{file.path}:{line}")
    else:
        yield Document(text, file.key, len(raw))


def _decode(raw: bytes) -> str:
    if (nul := raw.find(b"\0")) >= 0:
        raise _Bad("NUL byte", nul)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Bad("invalid UTF-8", error.start) from None
    if not text or text.isspace():
        raise _Bad("empty or blank")
    return text


def _json_text(line: str, key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: also integers of over 4300 digits
        raise _Bad("invalid JSON") from None
    if not isinstance(record, dict):
        raise _Bad("not a JSON object")
    if key not in record:
        raise _Bad(f"missing key {key!r}")
    text = record[key]
    if not isinstance(text, str):
        raise _Bad(f"value of {key!r} not a string")
    try:
        # JSON escapes can spell NUL and lone surrogates, which are no UTF-8 text.
        return _decode(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise _Bad("invalid UTF-8") from None


@dataclass(frozen=True)
class Corpus:
    """Prepared data: two `.bin`/`.idx` prefixes and their tokenizer. `sha256` is of the sources."""

    train_prefix: Path
    valid_prefix: Path
    tokenizer_dir: Path
    vocab_size: int
    sha256: str
    num_documents: int
    train_tokens: int
    valid_tokens: int
    description: str


def stdlib_corpus(
    cache_dir: Path, vocab_size: int = 4096, workers: int = 2, progress: bool = True
) -> Corpus:
    """The source of this Python's standard library, tokenized once and kept in `cache_dir`.

    Tests and installed packages are left out; about 5 % of the files, the same ones everywhere,
    are held out for validation. The cache is keyed on the Python version and the files' names and
    sizes. Processes that call at once get the same data: one prepares it, the others wait, and
    where the file system has no locks they all prepare it and the first to finish is kept.

    Raises:
        ValueError: no library source, a vocabulary too small, or a damaged cache.
        OSError: `cache_dir` cannot be written.
    """
    files = _stdlib_files(Path(sysconfig.get_paths()["stdlib"]))
    listing = json.dumps([_STDLIB_FORMAT, [(file.key, file.size) for file in files]])
    key = hashlib.sha256(listing.encode()).hexdigest()[:12]
    folder = cache_dir.absolute() / f"stdlib-{platform.python_version()}-{vocab_size}-{key}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            lock = stack.enter_context((folder.parent / f".{folder.name}.lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                logger.info("no file locks in %s (%s): preparing alone", cache_dir, error)
            if not folder.is_dir():
                _prepare_stdlib(folder, files, vocab_size, workers, progress)
    return _load(folder)


def _stdlib_files(root: Path) -> list[SourceFile]:
    """Every `.py` of the library, without what `_STDLIB_LEFT_OUT` and `_STDLIB_LOCAL` name."""
    files = _walk(
        root,
        (".py",),
        lambda name: name in _STDLIB_LEFT_OUT or name.startswith(("config-", *_STDLIB_LOCAL)),
    )
    if not files:
        raise ValueError(
            f"stdlib={root}: no .py files; this Python comes without its library's source, give "
            "data of your own with --data-path"
        )
    return files


def _prepare_stdlib(
    folder: Path, files: Sequence[SourceFile], vocab_size: int, workers: int, progress: bool
) -> None:
    """Prepare into a folder of another name, then rename it: `folder` is complete or absent."""
    logger.info("preparing %d files of the standard library in %s", len(files), folder)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        documents = list(read_documents(files, ReadReport()))
        held_out = [in_validation(document.key, STDLIB_VALID_FRACTION) for document in documents]
        split = {
            name: [d.text for d, out in zip(documents, held_out, strict=True) if out == wanted]
            for name, wanted in (("train", False), ("valid", True))
        }
        size = train_tokenizer(split["train"], vocab_size, partial / "tokenizer")
        built = {
            name: build_indexed(
                texts, partial / "tokenizer", partial / name, workers, progress,
                total_bytes=sum(len(text.encode()) for text in texts),
            )
            for name, texts in split.items()
        }  # fmt: skip
        record = {
            "vocab_size": size,
            "sha256": _digest(files),
            "num_documents": len(documents),
            "train_tokens": built["train"].num_tokens,
            "valid_tokens": built["valid"].num_tokens,
            "description": f"Python {platform.python_version()} standard library source, "
            f"{len(documents)} files, {built['valid'].num_documents} of them held out",
        }
        write_text(partial / "corpus.json", json.dumps(record, indent=2) + "\n")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else: another process was first, with the same data
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _digest(files: Sequence[SourceFile]) -> str:
    """sha256 over paths and contents, both with their lengths, in the order of `files`."""
    digest = hashlib.sha256()
    for file in files:
        content = file.path.read_bytes()
        digest.update(f"{len(file.key)} {len(content)} {file.key} ".encode() + content)
    return digest.hexdigest()


def _load(folder: Path) -> Corpus:
    """The corpus of a prepared folder, after checking it against its own record."""
    train, valid, tokenizer = folder / "train", folder / "valid", folder / "tokenizer"
    try:
        record = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        corpus = Corpus(train, valid, tokenizer, **record)
        json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
        vocab = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
        if len(vocab["model"]["vocab"]) != corpus.vocab_size:
            raise ValueError("the tokenizer has another vocabulary than corpus.json")
        for prefix, num_tokens in ((train, corpus.train_tokens), (valid, corpus.valid_tokens)):
            if check_prefix(prefix, corpus.vocab_size) != num_tokens:
                raise ValueError(f"{prefix}: another number of tokens than in corpus.json")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"cache={folder}: damaged ({error}); remove this folder, it will be prepared again"
        ) from error
    return corpus
