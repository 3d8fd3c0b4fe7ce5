"""What the tests of data share: a tokenizer, and files to prepare."""

import gzip
import random
from pathlib import Path

import pytest

from moa_megatron.data.tokenization import train_tokenizer
from tests.helpers.corpora import jsonl


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["def f(x):\n    return x + 1\n", "Größe, 漢字, 🙂"] * 3, 300, folder)
    return folder


@pytest.fixture
def inputs(tmp_path: Path, tokenizer_dir: Path) -> Path:
    rng = random.Random(5)
    texts = ["".join(rng.choices("abcdefgh \n", k=rng.randrange(3000))) + "." for _ in range(900)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:600]) + b"broken\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(texts[600:])))
    return tmp_path
