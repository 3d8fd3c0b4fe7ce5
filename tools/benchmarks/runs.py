"""Whole runs of a recipe for benchmarks and comparisons: start one, read what its log says."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_MILLISECONDS = re.compile(r"iteration +\d+/.*elapsed time per iteration \(ms\): ([0-9.]+)")
_TOKENS = re.compile(r"iteration +\d+/.*tokens/s: ([0-9,]+)")
_TERAFLOPS = re.compile(r"iteration +\d+/.*throughput per GPU \(TFLOP/s/GPU\): ([0-9.]+)")
_PEAK = re.compile(r"memory \(MB\).*max allocated: ([0-9.]+)")
_REFUSED = re.compile(r"^refused: (.*)$", re.MULTILINE)
# Megatron counts its first iteration into the second one's mean.
_WARM_UP = 2
_running: set[subprocess.Popen[str]] = set()


class RunFailed(Exception):
    """A run that did not end well, with its output."""


@dataclass
class Run:
    """What one run printed; medians leave the first two steps out, None where the log has none."""

    code: int
    output: str = field(repr=False)
    first_s: float = 0.0  # from the command to the first step

    def _median(self, pattern: re.Pattern[str]) -> float | None:
        values = [float(text.replace(",", "")) for text in pattern.findall(self.output)]
        return statistics.median(values[_WARM_UP:]) if values[_WARM_UP:] else None

    @property
    def step_ms(self) -> float | None:
        """Milliseconds of a step."""
        return self._median(_MILLISECONDS)

    @property
    def tokens_per_s(self) -> float | None:
        """Of all ranks together."""
        return self._median(_TOKENS)

    @property
    def flops_per_s(self) -> float | None:
        """Model FLOP/s of one GPU; the log has tenths of 1e12."""
        value = self._median(_TERAFLOPS)
        return value * 1e12 if value else None

    @property
    def peak_bytes(self) -> float | None:
        """Most memory that the first rank had allocated on its GPU."""
        found = _PEAK.findall(self.output)
        return max(map(float, found)) * 2**20 if found else None

    @property
    def refusal(self) -> str | None:
        """Why the entry point did not start, first line."""
        found = _REFUSED.search(self.output)
        return found[1] if found else None


def train(recipe: str, folder: Path, words: Sequence[str], *, log: Path | None = None) -> Run:
    """Trains ``recipe`` into ``folder`` and logs every step; writes its output to ``log`` too."""
    command = [*_launcher(), recipe, "--run-dir", str(folder), *words]
    command += ["--log-interval", "1", "--log-throughput", "--eval-iters", "0"]
    command += ["--log-memory-interval", "1"]
    begin, first, lines = time.perf_counter(), 0.0, []
    # Its own session: ``end_all`` reaches what the launcher has started.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={"NPROC": "1", **os.environ},  # one GPU, unless the user says otherwise
        start_new_session=True,
    )
    _running.add(process)
    assert process.stdout is not None
    with open(log or os.devnull, "w", encoding="utf-8", buffering=1) as copy:
        for line in process.stdout:
            lines.append(line)
            copy.write(line)
            if not first and _MILLISECONDS.search(line):
                first = time.perf_counter() - begin
    code = process.wait()
    _running.discard(process)
    return Run(code, "".join(lines), first)


def end_with_tool() -> None:
    """SIGTERM raises SystemExit from now on, so that ``end_all`` can be reached."""

    def stop(*_: object) -> None:
        # ``timeout`` sends it to the command and to its group: the second would end the clearing up
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(143)

    signal.signal(signal.SIGTERM, stop)


def end_all() -> None:
    """Kills the runs that have not ended, for a tool that is told to stop."""
    for process in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _launcher() -> list[str]:
    """The command of the README, where its environment is in use; else this interpreter."""
    if Path(sys.prefix).resolve() == (ROOT / ".venv").resolve():
        return [str(ROOT / "launch" / "local.sh")]
    return [sys.executable, "-m", "moa_megatron.pretrain"]
