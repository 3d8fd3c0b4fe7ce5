"""Readers, tokenizer, token files and the embedded corpus, against hand-made references."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moa_megatron.data import checking, encoding, token_files
from moa_megatron.data.checking import check_prefix
from moa_megatron.data.corpus import Corpus, stdlib_corpus
from moa_megatron.data.documents import (
    ReadReport,
    in_validation,
    read_documents,
)
from moa_megatron.data.encoding import TextEncoder
from moa_megatron.data.inputs import SourceFile, list_files
from moa_megatron.data.token_files import build_indexed
from moa_megatron.data.tokenization import END_OF_DOCUMENT, train_tokenizer

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "  leading blanks, tabs\t\tand trailing  ",
    "CRLF kept\r\nas it is\r\n",
    "Größe, 漢字, 🙂 and \u00a0 no-break",
    f"a text that says {END_OF_DOCUMENT} and <|pad|> itself",
    "x",
]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS * 3, 300, path)
    return path


@pytest.fixture
def built(tmp_path: Path, tokenizer_dir: Path) -> Path:
    build_indexed(TEXTS, tokenizer_dir, tmp_path / "data.v1", 1, progress=False)
    return tmp_path / "data.v1"


def read(path: Path, raw: bytes, **options: object) -> tuple[list[str], ReadReport]:
    path.write_bytes(raw)
    report = ReadReport()
    file = SourceFile(path, path.name, len(raw))
    return [d.text for d in read_documents([file], report, **options)], report  # type: ignore[arg-type]


NO_TEXT = "empty or blank"
JSONL_CASES = [
    (b'{"text": "a"}\n{"text": "b"}', ["a", "b"], {}, {}),
    (b"", [], {NO_TEXT: ["1"]}, {}),
    (b'\n{"text": "a"}\n   \n', ["a"], {NO_TEXT: ["1", "3"]}, {}),
    (b'{"text": ""}\n{"text": " \\n"}\n', [], {NO_TEXT: ["1", "2"]}, {}),
    (b'\xef\xbb\xbf{"text": "a"}\n', ["a"], {}, {"byte order mark stripped": ["1"]}),
    (b'{"text": "a\\r\\nb"}\r\n', ["a\r\nb"], {}, {"CRLF line end": ["1"]}),
    (b'{"text": "\xff"}\n{"text": "b"}\n', ["b"], {"invalid UTF-8": ["1"]}, {}),
    (b'{"text": "\\ud800"}\n', [], {"invalid UTF-8": ["1"]}, {}),
    (b'{"text": "a"\n' + b"[" * 99999 + b"\n", [], {"invalid JSON": ["1", "2"]}, {}),
    (b'["a"]\n"a"\n', [], {"not a JSON object": ["1", "2"]}, {}),
    (b'{"body": "a"}\n', [], {"missing key 'text'": ["1"]}, {}),
    (b'{"text": 1}\n{"text": null}\n', [], {"value of 'text' not a string": ["1", "2"]}, {}),
    (b'{"text": "a\0b"}\n{"text": "a\\u0000b"}\n', [], {"NUL byte": ["1", "2"]}, {}),
]


@pytest.mark.parametrize(("raw", "texts", "skipped", "noted"), JSONL_CASES)
def test_jsonl_lines(
    tmp_path: Path, raw: bytes, texts: list[str], skipped: dict, noted: dict
) -> None:
    path = tmp_path / "a.jsonl"
    found, report = read(path, raw)
    assert found == texts
    assert dict(report.skipped) == {kind: len(lines) for kind, lines in skipped.items()}
    assert dict(report.noted) == {kind: len(lines) for kind, lines in noted.items()}
    expected = {
        k: [(str(path), int(n), "") for n in lines] for k, lines in (skipped | noted).items()
    }
    assert report.locations == expected


WHOLE_CASES = [
    (b"a\nb", ["a\nb"], {}),
    (b"", [], {NO_TEXT: "1"}),
    (b" \n\t", [], {NO_TEXT: "1"}),
    (b"\xef\xbb\xbfa", ["a"], {"byte order mark stripped": "1"}),
    (b"a\nb\r\nc\r\n", ["a\nb\r\nc\r\n"], {"file with CRLF line ends, kept": "2"}),
    (b"a\nb\n\xff", [], {"invalid UTF-8": "3"}),
    (b"a\n\0", [], {"NUL byte": "2"}),
]


@pytest.mark.parametrize(("raw", "texts", "located"), WHOLE_CASES)
def test_whole_files(tmp_path: Path, raw: bytes, texts: list[str], located: dict) -> None:
    path = tmp_path / "a.txt"
    found, report = read(path, raw)
    assert found == texts
    expected = {kind: [(str(path), int(line), "")] for kind, line in located.items()}
    assert report.locations == expected


def test_report_keeps_first_locations_and_strict_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    raw = b'nope\n{"t": "ok"}\n' * 9
    texts, report = read(path, raw, json_key="t")
    assert len(texts) == 9 and len(report.lines()) == 1
    assert report.lines()[0].startswith(f"skipped 9 x invalid JSON: {path}:1, {path}:3")
    assert report.lines()[0].endswith(f"{path}:9, ...")
    with pytest.raises(ValueError, match=r"9 bad lines(.|\n)*invalid JSON.*a\.jsonl:1"):
        read(path, raw, json_key="t", strict=True)


def test_list_files(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a.py", "a.py", "b/c.txt", ".hidden/x.py", "__pycache__/y.py"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text("x")
    assert [file.key for file in list_files([tmp_path / "src"])] == ["a.py", "b/a.py", "b/z.py"]
    (tmp_path / "data.gz").write_text("x")
    with pytest.raises(ValueError, match=r"none: no such(.|\n)*'\.gz' is none of(.|\n)*no \.rs"):
        list_files([tmp_path / "none", tmp_path / "data.gz", tmp_path / "src"], (".rs",))


def test_split_is_stable_and_close_to_its_fraction() -> None:
    keys = [f"package/module_{i}.py" for i in range(4000)]
    held_out = [key for key in keys if in_validation(key, 0.05)]
    assert 150 < len(held_out) < 250
    # Reference: printf %s KEY | sha256sum, below 0x0ccc... (0.05 of the range).
    assert held_out[:3] == [f"package/module_{i}.py" for i in (2, 23, 43)]
    assert not any(in_validation(key, 0.0) for key in keys)
    assert {k for k in keys if in_validation(k, 0.05)} <= {k for k in keys if in_validation(k, 0.1)}


def test_tokenizer_is_deterministic_and_round_trips(tmp_path: Path, tokenizer_dir: Path) -> None:
    train_tokenizer(iter(TEXTS * 3), 300, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer_dir / name).read_bytes()
    encoder = TextEncoder(tokenizer_dir)
    for text in [*TEXTS, "".join(map(chr, range(1, 3000)))]:
        ids = encoder.encode(text)
        assert encoder._tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == text
        assert ids[-1] == encoder.eod and encoder.eod not in ids[:-1]


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"), [(TEXTS, 257, "vocab_size=257"), ([], 300, "none to train")]
)
def test_tokenizer_refuses(tmp_path: Path, texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, vocab_size, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_megatron_agrees_on_ids_offline(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    def refuse(*args: object) -> None:
        raise AssertionError("a tokenizer folder must load without network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    args = Namespace(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer_dir),
        chat_template=None, vocab_file=None, merge_file=None, special_tokens=None,
        tokenizer_hf_no_use_fast=False, trust_remote_code=False,
        tokenizer_hf_no_include_special_tokens=False, metadata_path=None, pad_vocab_size=False,
    )  # fmt: skip
    theirs, ours = build_tokenizer(args), TextEncoder(tokenizer_dir)
    assert (theirs.vocab_size, theirs.eod, theirs.pad) == (ours.vocab_size, ours.eod, 1)
    for text in TEXTS:
        if END_OF_DOCUMENT not in text:  # Megatron ends the document there, we do not
            assert theirs.tokenize(text) == ours.encode(text)[:-1].tolist()
            assert theirs.detokenize(ours.encode(text)[:-1].tolist()) == text


def test_long_texts_are_cut_without_changing_ids(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    alphabet = ["a", "b1", " ", "  ", "\n", "\n\n", "\t", "\r\n", "'s", "é", "\u00a0", "\x1c", ".."]
    text = "".join(rng.choices(alphabet, k=20_000))
    encoder = TextEncoder(tokenizer_dir)
    whole = encoder.encode(text)
    monkeypatch.setattr(encoding, "_PIECE_CHARS", 20)
    assert len(encoding._pieces(text)) > 300
    assert "".join(encoding._pieces(text)) == text
    np.testing.assert_array_equal(encoder.encode(text), whole)


def test_megatron_reads_our_files(built: Path, tokenizer_dir: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset, encoder = IndexedDataset(str(built)), TextEncoder(tokenizer_dir)
    assert len(dataset) == len(TEXTS) and dataset.index.dtype == np.uint16
    assert dataset.document_indices.tolist() == list(range(len(TEXTS) + 1))
    for text, ids in zip(TEXTS, dataset, strict=True):
        decoded = encoder._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert decoded == text + END_OF_DOCUMENT
    assert check_prefix(built, encoder.vocab_size) == sum(map(len, dataset))


def test_workers_do_not_change_the_bytes(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "_CHUNK_CHARS", 2000)  # many more chunks than workers
    rng = random.Random(1)
    texts = ["".join(rng.choices(TEXTS, k=rng.randrange(1, 200))) for _ in range(60)]
    reports = [
        build_indexed(iter(texts), tokenizer_dir, tmp_path / str(n), n, progress=False)
        for n in (1, 2, 5)
    ]
    assert len({(r.num_documents, r.num_tokens, r.num_bytes) for r in reports}) == 1
    assert reports[0].num_bytes == sum(len(text.encode()) for text in texts)
    for suffix in (".bin", ".idx"):
        first, *others = [(tmp_path / f"{n}{suffix}").read_bytes() for n in (1, 2, 5)]
        assert all(other == first for other in others)


def test_without_eod(tmp_path: Path, tokenizer_dir: Path) -> None:
    prefix = tmp_path / "data"
    build_indexed(["x"], tokenizer_dir, prefix, 1, progress=False, append_eod=False)
    assert check_prefix(prefix, 300) == 1


def test_failed_builds_leave_nothing(tmp_path: Path, tokenizer_dir: Path) -> None:
    def failing() -> Iterator[str]:
        yield from TEXTS * 100
        raise OSError("disk gone")

    for texts, error in ((failing(), OSError), (iter(()), ValueError)):
        with pytest.raises(error):
            build_indexed(texts, tokenizer_dir, tmp_path / "data", 2, progress=False)
        assert list(tmp_path.iterdir()) == []


def test_crash_between_the_two_renames(
    built: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New data over an old pair: the old index must never describe the new data."""
    replace = os.replace

    def only_bin(source: Path, target: Path) -> None:
        if str(target).endswith(".idx"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", only_bin)
    with pytest.raises(KeyboardInterrupt):
        build_indexed(TEXTS[::-1], tokenizer_dir, built, 1, progress=False)
    with pytest.raises(ValueError, match=r"no file .*\.idx"):
        check_prefix(built, 300)


def endless() -> Iterator[str]:
    while True:
        yield from TEXTS


def test_killed_build_leaves_no_pair_and_can_be_rerun(tmp_path: Path, tokenizer_dir: Path) -> None:
    prefix = tmp_path / "data"
    build_indexed(["x"], tokenizer_dir, tmp_path / "warm", 1, progress=False)  # imports Megatron
    job = multiprocessing.get_context("fork").Process(
        target=build_indexed, args=(endless(), tokenizer_dir, prefix, 2, False)
    )
    job.start()
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size for path in tmp_path.glob(".data.*/tokens")):
        assert time.monotonic() < deadline, "the build wrote nothing"
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGKILL)  # type: ignore[arg-type]
    job.join()
    assert job.exitcode == -signal.SIGKILL
    assert not (tmp_path / "data.bin").exists() and not (tmp_path / "data.idx").exists()
    with pytest.raises(ValueError, match="killed run"):
        check_prefix(prefix, 300)
    build_indexed(TEXTS, tokenizer_dir, prefix, 1, progress=False)
    assert check_prefix(prefix, 300)


def test_check_prefix_refuses(built: Path) -> None:
    binary, index = Path(f"{built}.bin"), Path(f"{built}.idx")
    bin_bytes, idx_bytes = binary.read_bytes(), index.read_bytes()
    tokens = len(bin_bytes) // 2
    cases = [
        (bin_bytes[:-1], idx_bytes, rf"{len(bin_bytes) - 1:,} bytes.*{tokens:,} tokens"),
        (b"", idx_bytes, "0 bytes"),
        (bin_bytes, b"not an index" + idx_bytes, "not a Megatron index"),
        (bin_bytes, idx_bytes[:20], "not a Megatron index"),
        (bin_bytes, idx_bytes[:-8], f"{len(idx_bytes) - 8:,} bytes, {len(idx_bytes):,} needed"),
        (bin_bytes, idx_bytes[:9] + b"\2" + idx_bytes[10:], "version 2"),
        (bin_bytes, idx_bytes[:17] + b"\7" + idx_bytes[18:], "dtype code 7"),
        (bin_bytes, idx_bytes[:-8] + b"\1" + b"\0" * 7, "inconsistent"),
        (bin_bytes, idx_bytes[:18] + b"\0" * 16, "34 bytes"),
    ]
    for new_bin, new_idx, message in cases:
        binary.write_bytes(new_bin)
        index.write_bytes(new_idx)
        with pytest.raises(ValueError, match=message):
            check_prefix(built, 300)


def test_vocabulary_is_checked_in_files_of_any_size(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    highest = int(np.fromfile(f"{built}.bin", dtype=np.uint16).max())
    for limit in (1 << 26, 1):  # scanned in full, and sampled
        monkeypatch.setattr(checking, "_FULL_SCAN_TOKENS", limit)
        monkeypatch.setattr(checking, "_SAMPLE_TOKENS", 8)
        assert check_prefix(built, highest + 1)
        with pytest.raises(ValueError, match=f"to {highest}, the vocabulary has {highest} "):
            check_prefix(built, highest)


def test_encoder_refuses_and_ignores_stored_truncation(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded"):
        TextEncoder(tmp_path)
    state = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    state["truncation"] = {
        "max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="no eos_token"):
        TextEncoder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|pad|>"}}')
    encoder = TextEncoder(tmp_path)
    assert encoder.eod == 1 and len(encoder.encode(TEXTS[0])) > 3


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of 60 small files, with folders to leave out."""
    root = tmp_path / "lib"
    for i in range(60):
        path = root / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {i}\n" + TEXTS[0] * i)
    for name in ("test/a.py", "x/tests/b.py", "site-packages/c.py", "config-3/d.py",
                 "_sysconfigdata_x.py"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("left out\n")
    (root / "empty.py").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_stdlib_corpus(tmp_path: Path, library: Path) -> None:
    first = stdlib_corpus(tmp_path / "cache", 280, progress=False)
    assert first.num_documents == 60 and first.vocab_size == 280 and first.valid_tokens > 0
    assert first.train_tokens > 5 * first.valid_tokens
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    assert stdlib_corpus(tmp_path / "cache", 280) == first
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    again = stdlib_corpus(tmp_path / "other", 280, workers=1, progress=False)
    assert again.sha256 == first.sha256
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer/tokenizer.json"):
        one, two = first.train_prefix.parent / name, again.train_prefix.parent / name
        assert one.read_bytes() == two.read_bytes()
    encoder = TextEncoder(first.tokenizer_dir)
    ids = [
        np.fromfile(f"{p}.bin", dtype=np.uint16) for p in (first.train_prefix, first.valid_prefix)
    ]
    texts = [encoder._tokenizer.decode(i.tolist(), skip_special_tokens=False) for i in ids]
    train, valid = (set(text.split(END_OF_DOCUMENT)[:-1]) for text in texts)
    assert not train & valid and len(train | valid) == 60
    (library / "package0" / "module0.py").write_text("# changed size\n")
    assert stdlib_corpus(tmp_path / "cache", 280, progress=False).sha256 != first.sha256


def test_damaged_cache_is_refused(tmp_path: Path, library: Path) -> None:
    made = stdlib_corpus(tmp_path, 280, progress=False)
    binary = Path(f"{made.train_prefix}.bin")
    binary.write_bytes(binary.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"damaged(.|\n)*remove this folder"):
        stdlib_corpus(tmp_path, 280)


def prepare(cache: Path, queue: multiprocessing.Queue) -> None:
    queue.put(stdlib_corpus(cache, 280, progress=False))


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_prepare_the_same(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:

        def refuse(*args: object) -> None:
            raise OSError("no locks here")

        monkeypatch.setattr("fcntl.flock", refuse)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    jobs = [context.Process(target=prepare, args=(tmp_path / "c", queue)) for _ in range(2)]
    for job in jobs:
        job.start()
    found: list[Corpus] = [queue.get(timeout=60) for _ in jobs]
    for job in jobs:
        job.join()
    assert found[0] == found[1] == stdlib_corpus(tmp_path / "c", 280)
    assert len([path for path in (tmp_path / "c").iterdir() if path.is_dir()]) == 1


def test_import_stays_light() -> None:
    """Where the package's own `__init__` is: these modules add neither torch nor Megatron."""
    code = (
        "import sys; import moa_megatron; before = set(sys.modules); "
        "import moa_megatron.data.corpus; "
        "added = set(sys.modules) - before; "
        "sys.exit(bool({'torch', 'megatron', 'transformers'} & added))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
