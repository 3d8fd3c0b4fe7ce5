"""tools/gpu_check.sh around a stand-in for Python: its parts, its report, its refusals."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from tools import bench, check_numerics
from tools.benchmarks.sides import SIDES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
PARTS = ["tests", "numerics", "experts", "step", "fp8", "op", "layer", "images"]
# Records its words; it fails as the second part.
STAND_IN = """#!/usr/bin/env python3
import json, os, sys
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


def test_refusals(tmp_path: Path) -> None:
    done = check(tmp_path, str(tmp_path / "out"), "nope")
    assert done.returncode == 78 and "no part 'nope': choose from tests" in done.stderr
    done = check(tmp_path, str(tmp_path / "out"), "op")
    assert done.returncode == 78 and "no CUDA device" in done.stderr
    done = check(tmp_path, "--help")
    assert done.returncode == 0 and all(f"  {part} " in done.stdout for part in PARTS)
