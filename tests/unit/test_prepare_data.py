"""The command as users run it: exit status, messages, report."""

import subprocess
import sys
from pathlib import Path

import pytest

from moa_megatron.data.checking import check_prefix
from moa_megatron.data.tokenization import train_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = "".join(f'{{"body": "document number {i}"}}\n' for i in range(40))
    (tmp_path / "a.jsonl").write_text(lines + "broken\n\n")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "m.rs").write_text("fn main() {}\n")
    return tmp_path


def test_prepares_a_split_and_reports(folder: Path) -> None:
    done = run(
        folder, "a.jsonl", "src", "--suffix", ".rs", "--json-key", "body", "--output", "my data/x",
        "--train-tokenizer", "270", "--split-valid", "0.3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = {name: check_prefix(folder / f"my data/x-{name}", 270) for name in ("train", "valid")}
    report = done.stdout.splitlines()
    num_documents = 0
    for line, name in zip(report, ("valid", "train"), strict=False):
        assert line.startswith(f"{name}: ") and f" {counts[name]:,} tokens" in line
        num_documents += int(line.split()[1])
    assert num_documents == 41
    assert report[2:4] == [
        "skipped 1 x empty or blank: a.jsonl:42",
        "skipped 1 x invalid JSON: a.jsonl:41",
    ]
    assert report[4] == (
        "train with: --train-data-path 'my data/x-train' --valid-data-path 'my data/x-valid' "
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model 'my data/x-tokenizer'"
    )
    # Existing output is not replaced unasked, and nothing is left beside it.
    again = run(
        folder, "a.jsonl", "--output", "my data/x", "--train-tokenizer", "270",
        "--split-valid", "0.3",
    )  # fmt: skip
    assert again.returncode == 78 and "x-train.bin: exists; pass --overwrite" in again.stderr
    assert not list(folder.rglob("*.partial"))


def test_strict_refuses_before_writing(folder: Path) -> None:
    train_tokenizer(["text"], 300, folder / "t")
    done = run(
        folder, "a.jsonl", "--json-key", "body", "--output", "x", "--tokenizer", "t", "--strict"
    )
    assert done.returncode == 78 and "Traceback" not in done.stderr
    assert "2 bad lines or files" in done.stderr and "a.jsonl:41" in done.stderr
    assert not list(folder.glob("x.*i*"))
    # The parts stay: whoever accepts the report needs seconds.
    done = run(folder, "a.jsonl", "--json-key", "body", "--output", "x", "--tokenizer", "t")
    assert done.returncode == 0 and "going on: 1 of 1 parts" in done.stderr
    assert done.stdout.startswith("all: 40 documents") and not (folder / "x.parts").exists()


def test_all_violations_in_one_message(folder: Path) -> None:
    done = run(
        folder, "none.jsonl", "src", "--workers", "0", "--split-valid", "1.5", "--suffix", "rs",
        "--tokenizer", "none",
    )  # fmt: skip
    assert done.returncode == 78 and "Traceback" not in done.stderr
    for part in (
        "--workers 0", "--split-valid 1.5", "--suffix rs", "none.jsonl: no such file",
        "--output: missing", "tokenizer=none",
    ):  # fmt: skip
        assert part in done.stderr


def test_bad_usage_and_help(folder: Path) -> None:
    assert run(folder, "--workers", "many").returncode == 78
    done = run(folder, "--stdlib", "a.jsonl")
    assert done.returncode == 78 and "INPUT: has no meaning with --stdlib" in done.stderr
    done = run(folder, "--help")
    assert done.returncode == 0 and done.stdout.count("\n  tools/prepare_data.py ") == 4


def test_unwritable_output_is_a_storage_error(folder: Path) -> None:
    train_tokenizer(["text"], 300, folder / "t")
    (folder / "file").write_text("in the way")
    done = run(
        folder, "a.jsonl", "--json-key", "body", "--output", "file/x", "--train-tokenizer", "300"
    )
    assert done.returncode == 74 and "Traceback" not in done.stderr
