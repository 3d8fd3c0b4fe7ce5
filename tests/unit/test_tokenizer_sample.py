"""What a tokenizer is trained on: about as much text as asked for, from every file."""

from pathlib import Path

import pytest

from moa_megatron.data import inputs, preparing
from moa_megatron.data.parts import Options

LINE = '{"text": "%s"}\n' % ("x" * 90)


def sampled(folder: Path, wanted: int, suffix: str) -> list[str]:
    files = inputs.list_files([folder], (suffix,))
    request = preparing.Request(files, folder / "out", Options(), None, 300, tokenizer_bytes=wanted)
    return list(preparing._sample(request))


def test_lines_stop_at_the_budget(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jsonl").write_text(LINE * 1000)
    texts = sampled(tmp_path, 10_000, ".jsonl")
    assert 10_000 <= sum(map(len, texts)) * len(LINE) / 90 <= 11_000


@pytest.mark.parametrize(("wanted", "files"), [(1_000, 1), (100_000, 2), (10**9, 5)])
def test_whole_files_stop_at_the_budget(wanted: int, files: int, tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.py").write_text("y" * 60_000)
    assert len(sampled(tmp_path, wanted, ".py")) == files


def test_what_small_files_leave_goes_to_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "b.jsonl").write_text(LINE * 1000)
    assert len(sampled(tmp_path, 50 * len(LINE), ".jsonl")) == 50
