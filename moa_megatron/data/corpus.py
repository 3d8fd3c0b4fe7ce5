"""The embedded default corpus: the Python standard library's own source, prepared once."""

import hashlib
import json
import logging
import platform
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moa_megatron.data.checking import check_prefix
from moa_megatron.data.documents import (
    ReadReport,
    in_validation,
    read_documents,
)
from moa_megatron.data.inputs import SourceFile, walk
from moa_megatron.data.once import prepare_once
from moa_megatron.data.token_files import build_indexed
from moa_megatron.data.tokenization import train_tokenizer, write_text

logger = logging.getLogger(__name__)

STDLIB_VALID_FRACTION = 0.05
# Part of the cache key: raise it when the same files would give other data.
_STDLIB_FORMAT = 1
_STDLIB_LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload"
}  # fmt: skip
# They hold the paths of the machine that built or installed Python.
_STDLIB_LOCAL = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")


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
    prepare_once(folder, lambda into: _prepare_stdlib(into, files, vocab_size, workers, progress))
    return _load(folder)


def _stdlib_files(root: Path) -> list[SourceFile]:
    """Every `.py` of the library, without what `_STDLIB_LEFT_OUT` and `_STDLIB_LOCAL` name."""
    files = walk(
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
    logger.info("preparing %d files of the standard library for %s", len(files), folder.parent)
    documents = list(read_documents(files, ReadReport()))
    held_out = [in_validation(document.key, STDLIB_VALID_FRACTION) for document in documents]
    split = {
        name: [d.text for d, out in zip(documents, held_out, strict=True) if out == wanted]
        for name, wanted in (("train", False), ("valid", True))
    }
    size = train_tokenizer(split["train"], vocab_size, folder / "tokenizer")
    built = {
        name: build_indexed(
            texts, folder / "tokenizer", folder / name, workers, progress,
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
    write_text(folder / "corpus.json", json.dumps(record, indent=2) + "\n")


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
