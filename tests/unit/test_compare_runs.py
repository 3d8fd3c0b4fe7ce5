"""Curves read back from TensorBoard, and the comparison of runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch.utils.tensorboard import SummaryWriter

from moa_megatron import runstate, telemetry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_runs", ROOT / "tools/compare_runs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_runs"] = module
    spec.loader.exec_module(module)
    return module


def make_run(folder: Path, losses: list[float]) -> Path:
    writer = SummaryWriter(str(folder / "tensorboard"))
    for step, loss in enumerate(losses, start=1):
        writer.add_scalar(telemetry.VALID_LOSS, loss, step)
    writer.close()
    runstate.write_status(folder, "finished", 0, validation_loss=losses[-1])
    return folder


def test_newer_values_win_after_a_resume(tmp_path: Path) -> None:
    make_run(tmp_path, [3.0, 2.0])
    make_run(tmp_path, [2.5])
    curve = telemetry.read_scalars(tmp_path / "tensorboard", (telemetry.VALID_LOSS,))
    found = curve[telemetry.VALID_LOSS]
    assert found.steps == [1, 2] and found.values == [2.5, 2.0]
    assert telemetry.read_scalars(tmp_path / "tensorboard", ("absent",)) == {}


def test_the_test_set_is_told_from_validation(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    for step, loss in ((2, 3.0), (4, 2.0), (4, 2.1), (4, 9.0)):  # in the loop, at the end, test
        writer.add_scalar(telemetry.VALID_LOSS, loss, step)
    writer.close()
    curves = telemetry.read_run(tmp_path, tested=True)
    assert curves[telemetry.VALID_LOSS].values == pytest.approx([3.0, 2.1])
    assert curves[telemetry.TEST_LOSS].values == [9.0]
    assert telemetry.TEST_LOSS not in telemetry.read_run(tmp_path, tested=False)


def test_differences_are_paired_by_seed(tool: ModuleType, tmp_path: Path) -> None:
    rows = [("base", 1, 3.0), ("base", 2, 4.0), ("bi", 1, 2.9), ("bi", 2, 3.7)]
    results = [tool.Result(name, seed, loss, tmp_path) for name, seed, loss in rows]
    base, bi = tool.summarize(results)
    assert (base["delta"], base["error"]) == (0.0, 0.0)
    assert bi["loss"] == pytest.approx(3.3) and bi["delta"] == pytest.approx(-0.2)
    assert bi["error"] == pytest.approx(0.1)
    last = tool.markdown([base, bi]).splitlines()[-1]
    assert last.replace("|", " ").split() == ["bi", "2", "3.3000", "-0.2000", "0.1000"]


def test_command_writes_table_and_picture(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, [3.0, loss]) for name, loss in (("a", 2.0), ("b", 1.9))]
    command = [sys.executable, str(ROOT / "tools/compare_runs.py"), *map(str, runs)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["results"][1]["delta"] == pytest.approx(-0.1)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000
    refused = subprocess.run(
        [*command[:2], str(tmp_path / "nothing")], capture_output=True, text=True
    )
    assert refused.returncode == 78 and "no finished run" in refused.stderr
