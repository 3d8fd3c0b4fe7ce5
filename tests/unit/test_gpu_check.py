"""tools/gpu_check.sh around a stand-in for Python: its parts, its report, its refusals."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.slurm import marked_processes
from tools import bench, check_numerics
from tools.benchmarks import step
from tools.benchmarks.sides import SIDES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
SUITE = ["tests", "numerics", "dense", "experts"]
MEASURING = ["step", "fp8", "op", "layer", "images"]
# Records its words; it fails as the comparisons of losses.
STAND_IN = f"""#!{sys.executable}
import json, os, sys
if "import torch, transformer_engine" in sys.argv[-1]:
    folders = os.environ["PYTHONPATH"].split(":")
    found = any(os.path.exists(folder + "/transformer_engine") for folder in folders)
    sys.exit("no such module" if os.environ.get("MISSING") and not found else 0)
if sys.argv[1] in ("-c", "-"):
    print("a GPU of", sys.argv[0], os.environ.get("MOA_PYTHON"))
    sys.exit()
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
print("a table\\n{{" + "x" * 999)
sys.exit("last words" if "tools/check_numerics.py" in sys.argv else 0)
"""


def variables(folder: Path, **more: str) -> dict[str, str]:
    """The environment without what chooses an interpreter or an archive; nothing is kept."""
    mine = ("PYTHON", "MOA_PYTHON", "OVERLAY", "NO_ENGINE", "DEADLINE")
    inherited = {name: value for name, value in os.environ.items() if name not in mine}
    fixed = {"CUDA_VISIBLE_DEVICES": "", "CALLS": str(folder / "calls"), "RESULTS": ""}
    return {**inherited, **fixed, **more}


def check(
    folder: Path, *words: str, script: Path = SCRIPT, **more: str
) -> subprocess.CompletedProcess[str]:
    command = [str(script), *words]
    environment = variables(folder, **more)
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def calls(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def stand_in_at(file: Path, text: str = STAND_IN) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    return stand_in_at(tmp_path / "python")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The script in a checkout that has nothing else."""
    (tmp_path / "checkout" / "tools").mkdir(parents=True)
    return Path(shutil.copy(SCRIPT, tmp_path / "checkout" / "tools"))


def reported(report: Path) -> list[str]:
    return [line[3:] for line in report.read_text().splitlines() if line.startswith("## ")]


def test_every_part_runs_and_is_reported_though_one_fails(tmp_path: Path, stand_in: str) -> None:
    done = check(tmp_path, str(tmp_path / "out"), "all", PYTHON=stand_in)
    assert done.returncode == 1 and "last words" in done.stdout
    assert reported(tmp_path / "out" / "report.md") == SUITE + MEASURING
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count("Exit code 1") == 2 and report.count("Exit code 0") == 7
    assert report.count("a table") == 9
    assert "a GPU" in report and "xxx" not in report and "    python tools/bench.py --op" in report
    assert "--flags --mock-data\\ --moa-align\\ 64" in report, "as it could be typed"


def test_what_measures_runs_only_when_named(tmp_path: Path, stand_in: str) -> None:
    check(tmp_path, str(tmp_path / "out"), PYTHON=stand_in)
    assert reported(tmp_path / "out" / "report.md") == SUITE
    done = check(tmp_path, str(tmp_path / "out"), "op", "tests", PYTHON=stand_in)
    assert done.returncode == 0, done.stderr
    assert [words[-2:][0] == "--json" for words in calls(tmp_path)[len(SUITE) :]] == [False, True]


def test_the_commands_are_those_that_the_tools_take(tmp_path: Path, stand_in: str) -> None:
    check(tmp_path, str(tmp_path / "out"), "all", PYTHON=stand_in)
    recipes, targets = [], {}
    for tool, *words in calls(tmp_path):
        if tool == "tools/bench.py":
            mode = words[0].removeprefix("--")
            options = bench._parser(mode, importlib.import_module(f"tools.benchmarks.{mode}"))
            parsed = options.parse_args(words)
            assert set(getattr(parsed, "sides", [])) <= set(SIDES)
            if mode == "step":
                assert parsed.pairs > 1, "the smallest and the largest ratio are two"
                targets.update({(parsed.sides[0], k): v for k, v in step._targets(parsed).items()})
        elif tool == "tools/check_numerics.py":
            asked = check_numerics._parser().parse_args(words)
            recipes.append(asked.recipe)
            assert all("dense" in SIDES[name].needs or "fp8" in name for name in asked.sides or ())
        else:
            paths = [word for word in words if word.startswith("tests/")]
            assert paths and all((ROOT / path).exists() for path in paths)
    assert recipes == ["tiny-moe", "tiny-dense"]
    assert targets == {("fixed", "moa"): 0.96, ("moa", "fp8-blockwise"): 1.15}


def test_the_suite_has_one_deadline(tmp_path: Path, stand_in: str) -> None:
    slow = STAND_IN.replace('print("a table', 'import time; time.sleep(300); print("a')
    stand_in_at(Path(stand_in), slow)
    done = check(tmp_path, str(tmp_path / "out"), PYTHON=stand_in, DEADLINE="22")
    assert done.returncode == 1 and len(calls(tmp_path)) == 1
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Exit code 124" in report and report.count("Not run: no time was left of 22 s") == 3


def test_the_report_is_kept_under_its_date_once(tmp_path: Path, stand_in: str) -> None:
    results = tmp_path / "results"
    out, kept = str(tmp_path / "out"), {"PYTHON": stand_in, "RESULTS": str(results)}
    check(tmp_path, out, "op", **kept)
    assert [file.name[10:] for file in results.iterdir()] == ["-gpu-bench.md"]
    check(tmp_path, out, "op", "tests", **kept)
    file = next(results.glob("*-gpu.md"))
    assert reported(file) == ["tests", "op"]
    done = check(tmp_path, out, "tests", **kept)
    assert f"{file} exists and stays as it is" in done.stdout and reported(file) == ["tests", "op"]


@pytest.mark.parametrize("chosen", ["PYTHON", "MOA_PYTHON", ".venv", "python3"])
def test_the_interpreter(tmp_path: Path, elsewhere: Path, chosen: str) -> None:
    """Each of them where those before it are not there."""
    places = {
        "PYTHON": tmp_path / "one" / "python",
        "MOA_PYTHON": tmp_path / "two" / "python",
        ".venv": elsewhere.parents[1] / ".venv" / "bin" / "python",
        "python3": tmp_path / "bin" / "python3",
    }
    there = list(places)[list(places).index(chosen) :]
    paths = {name: stand_in_at(places[name]) for name in there}
    more = {name: path for name, path in paths.items() if name.endswith("PYTHON")}
    more["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    check(tmp_path, str(tmp_path / "out"), "op", script=elsewhere, **more)
    said = ".venv/bin/python" if chosen == ".venv" else paths[chosen]
    inherited = said if chosen.endswith("PYTHON") else None
    assert f"a GPU of {said} {inherited}\n" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("place", ["OVERLAY", "shared"])
def test_an_archive_brings_the_engine(
    tmp_path: Path, stand_in: str, elsewhere: Path, place: str
) -> None:
    (tmp_path / "transformer_engine").touch()
    archive = tmp_path / {"OVERLAY": "own.tar.xz", "shared": "shared/te/overlay-sm90.tar.xz"}[place]
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as file:
        file.add(tmp_path / "transformer_engine", "transformer_engine")
    more = {"PYTHON": stand_in, "MISSING": "1"}
    if place == "OVERLAY":
        more["OVERLAY"] = str(archive)
    done = check(tmp_path, str(tmp_path / "out"), "fp8", script=elsewhere, **more)
    assert done.returncode == 0 and "fp8-blockwise" in (tmp_path / "calls").read_text()
    assert "Transformer Engine from" in done.stdout


def test_without_the_engine_there_is_no_check(
    tmp_path: Path, stand_in: str, elsewhere: Path
) -> None:
    more = {"PYTHON": stand_in, "MISSING": "1"}
    done = check(tmp_path, str(tmp_path / "out"), script=elsewhere, **more)
    assert done.returncode == 78 and not (tmp_path / "calls").exists()
    for cure in ("(no such module): OVERLAY=", "PYTHON=", "NO_ENGINE=1"):
        assert cure in done.stderr
    done = check(tmp_path, str(tmp_path / "out"), "all", script=elsewhere, NO_ENGINE="1", **more)
    assert "fp8" not in (tmp_path / "calls").read_text()
    assert len(calls(tmp_path)) == len(SUITE + MEASURING) - 1
    for text in (done.stdout, (tmp_path / "out" / "report.md").read_text()):
        assert "No Transformer Engine: FP8 and its modules are left out." in text


def test_a_stopped_check_ends_its_part(tmp_path: Path, stand_in: str) -> None:
    slow = STAND_IN.replace('print("a table', 'import time; time.sleep(300); print("a')
    stand_in_at(Path(stand_in), slow)
    environment = variables(tmp_path, PYTHON=stand_in)
    process = subprocess.Popen([str(SCRIPT), str(tmp_path / "out")], env=environment)
    deadline = time.monotonic() + 20
    while not (tmp_path / "calls").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()  # a shell in the background was told to ignore Ctrl-C
    assert process.wait(20) == 143
    time.sleep(0.5)
    assert not marked_processes(stand_in)


def test_refusals(tmp_path: Path) -> None:
    done = check(tmp_path, str(tmp_path / "out"), "nope")
    assert done.returncode == 78 and "no part 'nope': choose from tests" in done.stderr
    for part in ("numerics", "all"):
        done = check(tmp_path, part)
        assert done.returncode == 78 and "the folder comes first" in done.stderr
    done = check(tmp_path, str(tmp_path / "out"), PYTHON="/nowhere/python")
    assert done.returncode == 78 and "/nowhere/python cannot be run" in done.stderr
    done = check(tmp_path, str(tmp_path / "out"), "op")
    assert done.returncode == 78 and "no CUDA device" in done.stderr
    done = check(tmp_path, "--help")
    assert done.returncode == 0
    assert all(f"  {part} " in done.stdout for part in SUITE + MEASURING)
