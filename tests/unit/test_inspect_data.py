"""tools/inspect_data.py as users run it, on sane and on damaged pairs."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moa_megatron.data import checking, token_files
from moa_megatron.data.checking import Index
from moa_megatron.data.encoding import TextEncoder
from moa_megatron.data.token_files import build_indexed
from moa_megatron.data.tokenization import train_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = ["one", "two words", "and a third document, which is longer than the others\n" * 9]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "inspect_data.py"), *words],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_tokenizer(TEXTS * 3, 280, tmp_path / "t")
    build_indexed(TEXTS, tmp_path / "t", tmp_path / "x", 1, progress=False)
    return tmp_path


def test_facts_texts_and_picture(folder: Path) -> None:
    words = ["x", "--json", "--checksum", "--tokenizer", "t", "--show", "2", "--document", "1"]
    done = run(folder, *words, "--plot", "x.png")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    lengths = [len(TextEncoder(folder / "t").encode(text)) for text in TEXTS]
    assert (facts["documents"], facts["tokens"]) == (3, sum(lengths))
    assert (facts["shortest"], facts["longest"]) == (min(lengths), max(lengths))
    counted = np.bincount([length.bit_length() - 1 for length in lengths]).tolist()
    assert facts["lengths"] == counted
    raw = (folder / "x.bin").read_bytes()
    assert facts["sha256"]["x.bin"] == hashlib.sha256(raw).hexdigest()
    assert [shown["document"] for shown in facts["shown"]] == [0, 1, 1]
    assert [shown["text"] for shown in facts["shown"]] == [
        text + "<|endoftext|>" for text in (TEXTS[0], TEXTS[1], TEXTS[1])
    ]
    assert (folder / "x.png").read_bytes().startswith(b"\x89PNG")
    readable = run(folder, "x", "--show", "3")
    assert f"x: 3 documents, {sum(lengths):,} tokens of uint16" in readable.stdout
    assert readable.stdout.count("  document ") == 3


def test_damage_is_named_and_others_are_still_shown(folder: Path) -> None:
    build_indexed(TEXTS, folder / "t", folder / "cut", 1, progress=False)
    os.truncate(folder / "cut.bin", 20)
    train_tokenizer(["a"], 258, folder / "small")
    done = run(folder, "none", "cut", "x")
    assert done.returncode == 78 and "Traceback" not in done.stderr
    assert "data prefix none: no file none.bin" in done.stderr
    assert "cut.bin: 20 bytes, but cut.idx describes" in done.stderr
    assert done.stdout.startswith("x: 3 documents")
    done = run(folder, "x", "--tokenizer", "small")
    assert done.returncode == 78 and "the vocabulary has 258" in done.stderr
    done = run(folder, "x", "--document", "3")
    assert done.returncode == 78 and "--document 3: x has 3, counted from 0" in done.stderr
    assert run(folder).returncode == 78


def test_blocks_do_not_show(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks read the index in blocks; here of one entry each."""
    monkeypatch.setattr(checking, "_BLOCK", 1)
    raw = (folder / "x.idx").read_bytes()
    index = Index(folder / "x")
    assert index.check() == sum(index.lengths(0, 9))
    first = len(raw) - 8 * 4 - 8 * 3  # pointers of three documents, then four bounds
    for position in (first + 8, first + 16, first + 24 + 8, first + 24 + 16, len(raw) - 8):
        changed = bytearray(raw)
        changed[position] ^= 0x40
        (folder / "x.idx").write_bytes(changed)
        with pytest.raises(ValueError, match=r"inconsistent|needed"):
            Index(folder / "x").check()


def test_reads_what_megatron_reads(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs, ours = IndexedDataset(str(folder / "x")), Index(folder / "x")
    for number in range(len(TEXTS)):
        np.testing.assert_array_equal(theirs[number], ours.document(number))


def test_the_lowest_id_is_found_and_a_broken_tokenizer_named(tmp_path: Path) -> None:
    np.array([7, 9, 8], "<i4").tofile(tmp_path / "tokens")
    np.array([3], "<i4").tofile(tmp_path / "lengths")
    piece = token_files.Piece(tmp_path / "tokens", tmp_path / "lengths", 0, 12, 0, 1)
    token_files.join([piece], tmp_path / "x", np.dtype("<i4"))
    assert checking.Index(tmp_path / "x").id_range(3, sampled=False) == (7, 9)
    (tmp_path / "tokenizer.json").write_text("{}")
    done = run(tmp_path, "x", "--tokenizer", ".")
    assert done.returncode == 78 and "tokenizer.json cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr
