"""tools/gpu_check.sh around a stand-in for Python: its parts, its report, its refusals."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.slurm import marked_processes
from tools import bench, check_numerics
from tools.benchmarks.sides import SIDES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
PARTS = ["tests", "numerics", "experts", "step", "fp8", "op", "layer", "images"]
# Records its words; it fails as the second part.
STAND_IN = """#!/usr/bin/env python3
import json, os, sys
if "import torch, transformer_engine" in sys.argv[-1] and os.environ.get("NO_ENGINE"):
    sys.exit("no such module")
if sys.argv[1] in ("-c", "-"):
    print("a GPU")
    sys.exit()
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
print("a table\\n{" + "x" * 999)
sys.exit("last words" if "tools/check_numerics.py" in sys.argv else 0)
"""


def check(
    folder: Path, *words: str, python: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "CALLS": str(folder / "calls")}
    if python is not None:
        environment["PYTHON"] = str(python)
    command = [str(SCRIPT), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    file = tmp_path / "python"
    file.write_text(STAND_IN)
    file.chmod(0o755)
    return file


def test_every_part_runs_and_is_reported_though_one_fails(tmp_path: Path, stand_in: Path) -> None:
    done = check(tmp_path, str(tmp_path / "out"), python=stand_in)
    assert done.returncode == 1 and "last words" in done.stdout
    report = (tmp_path / "out" / "report.md").read_text()
    assert [line[3:] for line in report.splitlines() if line.startswith("## ")] == PARTS
    assert report.count("Exit code 0") == len(PARTS) - 1 and report.count("a table") == len(PARTS)
    assert "a GPU" in report and "xxx" not in report and "    python tools/bench.py --op" in report
    assert "--flags --mock-data\\ --moa-align\\ 64" in report, "as it could be typed"


def test_parts_may_be_chosen(tmp_path: Path, stand_in: Path) -> None:
    done = check(tmp_path, str(tmp_path / "out"), "op", "tests", python=stand_in)
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [words[-2:][0] == "--json" for words in calls] == [False, True]


def test_the_commands_are_those_that_the_tools_take(tmp_path: Path, stand_in: Path) -> None:
    check(tmp_path, str(tmp_path / "out"), python=stand_in)
    seen = 0
    for line in (tmp_path / "calls").read_text().splitlines():
        tool, *words = json.loads(line)
        if tool == "tools/bench.py":
            mode = words[0].removeprefix("--")
            options = bench._parser(mode, importlib.import_module(f"tools.benchmarks.{mode}"))
            parsed = options.parse_args(words)
            assert set(getattr(parsed, "sides", [])) <= set(SIDES)
        elif tool == "tools/check_numerics.py":
            assert check_numerics._parser().parse_args(words).recipe == "tiny-moe"
        else:
            paths = [word for word in words if word.startswith("tests/")]
            assert paths and all((ROOT / path).exists() for path in paths)
        seen += 1
    assert seen == len(PARTS)


def test_without_the_engine_its_parts_are_left_out(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_ENGINE", "1")
    check(tmp_path, str(tmp_path / "out"), python=stand_in)
    calls = (tmp_path / "calls").read_text()
    assert "fp8" not in calls and calls.count("tools/bench.py") == len(PARTS) - 3
    assert "No Transformer Engine" in (tmp_path / "out" / "report.md").read_text()


def test_a_stopped_check_ends_its_part(tmp_path: Path, stand_in: Path) -> None:
    stand_in.write_text(
        STAND_IN.replace('print("a table', 'import time; time.sleep(300); print("a')
    )
    environment = {**os.environ, "PYTHON": str(stand_in), "CALLS": str(tmp_path / "calls")}
    process = subprocess.Popen([str(SCRIPT), str(tmp_path / "out")], env=environment)
    deadline = time.monotonic() + 20
    while not (tmp_path / "calls").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()  # a shell in the background was told to ignore Ctrl-C
    assert process.wait(20) == 143
    time.sleep(0.5)
    assert not marked_processes(str(stand_in))


def test_refusals(tmp_path: Path) -> None:
    done = check(tmp_path, str(tmp_path / "out"), "nope")
    assert done.returncode == 78 and "no part 'nope': choose from tests" in done.stderr
    done = check(tmp_path, "numerics")
    assert done.returncode == 78 and "the folder comes first" in done.stderr
    done = check(tmp_path, str(tmp_path / "out"), "op")
    assert done.returncode == 78 and "no CUDA device" in done.stderr
    done = check(tmp_path, "--help")
    assert done.returncode == 0 and all(f"  {part} " in done.stdout for part in PARTS)
