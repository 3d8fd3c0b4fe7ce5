"""What a person reads while a run goes on: Megatron's progress lines, with the speed.

Megatron prints some nine hundred lines at start-up. Everything goes to the run's log file; the
terminal gets the progress lines and what the project itself says.
"""

from __future__ import annotations

import io
import logging
import re
import sys
from pathlib import Path
from typing import TextIO

_PROGRESS = re.compile(
    r"iteration +\d+/ +\d+ \||loss at iteration|saving checkpoint|successfully saved"
)
_ELAPSED = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
_BATCH = re.compile(r"global batch size: +(\d+)")
_DROPPED = re.compile(r" (?:consumed samples|number of skipped iterations|loss scale): +[0-9.]+ \|")
# Of a squared error there is no perplexity, but Megatron prints one of every loss.
_NO_PERPLEXITY = re.compile(r" mae loss PPL: [0-9.E+-]+ \|")


class Console(io.TextIOBase):
    """A stream in front of stdout: a full copy to a file, selected lines to the terminal."""

    def __init__(self, terminal: TextIO, rank: int = 0) -> None:
        self.terminal, self.rank = terminal, rank
        self._units, self._unit = 0, "tokens"
        self.speed: float | None = None
        self._early: list[str] = []
        self._file: TextIO | None = None
        self._line = ""

    def open(self, path: Path, units: int, unit: str = "tokens") -> None:
        """From here on the copy goes to ``path``, what came before first.

        Args:
            path: of the log file.
            units: of a sample, for the speed: tokens of a sequence, or 1 image.
            unit: their name.
        """
        self._units, self._unit = units, unit
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._file.writelines(self._early)
        self._early.clear()

    def write(self, text: str) -> int:
        if self._file is None:
            self._early.append(text)
        else:
            self._file.write(text)
        self._line += text
        *lines, self._line = self._line.split("\n")
        for line in lines:
            if _PROGRESS.search(line):
                self.terminal.write(self._readable(line) + "\n")
        return len(text)

    def say(self, text: str = "") -> None:
        """A line for both the terminal and the file."""
        self.terminal.write(text + "\n")
        self.terminal.flush()
        (self._early.append if self._file is None else self._file.write)(text + "\n")

    def say_on_first_rank(self, text: str) -> None:
        """``say`` on rank 0; on other ranks a line for the file only."""
        if self.rank == 0:
            self.say(text)
        else:
            self.write(text + "\n")

    def flush(self) -> None:
        self.terminal.flush()
        if self._file is not None:
            self._file.flush()

    def isatty(self) -> bool:
        return self.terminal.isatty()

    def _readable(self, line: str) -> str:
        elapsed, batch = _ELAPSED.search(line), _BATCH.search(line)
        line = _NO_PERPLEXITY.sub("", _DROPPED.sub("", line)).strip()
        if elapsed and batch and self._units:
            seconds = float(elapsed.group(1)) / 1000
            self.speed = int(batch.group(1)) * self._units / max(seconds, 1e-9)
            line += f" {self._unit}/s: {self.speed:,.0f} |"
        return line


def _worth_saying(record: logging.LogRecord) -> bool:
    """Each upstream fix has its line in the log file; the terminal gets their number."""
    return record.levelno > logging.INFO or not record.name.startswith("moa_megatron.patches")


def install(rank: int) -> Console:
    """Puts a ``Console`` in front of stdout and sends warnings and chatter of libraries to it."""
    console = Console(sys.stdout, rank)
    sys.stdout = console
    handler = logging.StreamHandler(console)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    if rank:
        return console
    ours = logging.getLogger("moa_megatron")
    voice = logging.StreamHandler(console.terminal)
    voice.setFormatter(logging.Formatter("%(message)s"))
    voice.addFilter(_worth_saying)
    ours.addHandler(voice)
    return console
