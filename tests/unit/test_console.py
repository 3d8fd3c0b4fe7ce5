"""The terminal shows progress with tokens per second; the file holds everything."""

import io
from pathlib import Path

from moa_megatron.console import Console

LINE = (
    " [2026-01-01 00:00:00] iteration       10/     200 | consumed samples:           80 | "
    "elapsed time per iteration (ms): 500.0 | learning rate: 1.0E-03 | global batch size:     8 | "
    "lm loss: 8.0E+00 | loss scale: 1.0 | number of skipped iterations:   0 |\n"
)


def test_progress_reaches_the_terminal_with_tokens_per_second(tmp_path: Path) -> None:
    terminal = io.StringIO()
    console = Console(terminal)
    console.write("a thousand lines of arguments\n")
    console.open(tmp_path / "logs" / "rank0.log", units=128)
    half = len(LINE) // 2
    console.write(LINE[:half])
    console.write(LINE[half:])
    shown = terminal.getvalue()
    assert shown.count("\n") == 1 and "tokens/s: 2,048 |" in shown
    assert "consumed samples" not in shown and "loss scale" not in shown
    assert console.speed == 8 * 128 / 0.5
    console.flush()
    assert (tmp_path / "logs" / "rank0.log").read_text() == "a thousand lines of arguments\n" + LINE


def test_other_ranks_stay_quiet(tmp_path: Path) -> None:
    terminal = io.StringIO()
    console = Console(terminal, rank=1)
    console.open(tmp_path / "rank1.log", units=128)
    console.say_on_first_rank("model and layout")
    assert terminal.getvalue() == ""
    console.flush()
    assert "model and layout" in (tmp_path / "rank1.log").read_text()
