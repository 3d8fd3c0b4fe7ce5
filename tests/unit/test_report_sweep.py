"""The report of a sweep, from folders as runs leave them: finished, stopped, broken, absent."""

import csv
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from moa_megatron import runstate, telemetry

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "tools/report_sweep.py")]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_sweep", ROOT / "tools/report_sweep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["report_sweep"] = module
    spec.loader.exec_module(module)
    return module


def make_sweep(folder: Path, *settings: dict[str, str]) -> Path:
    """A sweep that has been submitted, and no point of which has started."""
    names = [",".join(f"{key}={value}" for key, value in point.items()) for point in settings]
    points = [
        {"index": index, "name": name, "settings": point, "run_dir": f"point-{index}"}
        for index, (name, point) in enumerate(zip(names, settings))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    record = {"recipe": "tiny-moe", "flags": ["--seed", "7"], "points": points}
    (folder / "sweep.json").write_text(json.dumps(record))
    return folder


def make_run(folder: Path, index: int, loss: float, state: str = "finished", **facts: Any) -> None:
    run = folder / f"point-{index}"
    writer = SummaryWriter(str(run / "tensorboard"))
    for step in range(1, 7):
        writer.add_scalar(telemetry.TRAIN_LOSS, loss + 1 / step, step)
    for step in (3, 6):
        writer.add_scalar(telemetry.VALID_LOSS, loss + 1 / step, step)
    writer.close()
    code = {"finished": 0, "stopped": 75}.get(state, 1)
    known = {"step": 6, "train_iters": 6, "loss": loss + 0.01, "validation_loss": loss}
    runstate.write_status(run, state, code, **{**known, **facts})


def report(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, str(folder)], capture_output=True, text=True)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_finished_sweep_has_its_best_point_marked(tmp_path: Path) -> None:
    values = ("3e-4", "1e-3", "3e-3")
    sweep = make_sweep(tmp_path / "lr", *({"lr": value} for value in values))
    for index, loss in enumerate((2.4, 2.2, 2.9)):
        make_run(sweep, index, loss)
    done = report(sweep)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 points finished" in done.stdout and "--rerun" not in done.stdout
    assert "best: lr=1e-3, validation loss 2.2000" in done.stdout
    best = [line for line in done.stdout.splitlines() if "| best |" in line]
    assert len(best) == 1 and best[0].startswith("| lr=1e-3 | finished | 0 ")
    assert best[0] in (sweep / "sweep.md").read_text()
    assert [row["best"] for row in rows(sweep)] == ["0", "1", "0"]
    assert [row["lr"] for row in rows(sweep)] == list(values)
    assert [float(row["validation_loss"]) for row in rows(sweep)] == [2.4, 2.2, 2.9]
    height, width, _ = imread(sweep / "sweep.png").shape
    assert width > 2 * height


def test_points_that_did_not_finish_are_named_with_what_to_do(tmp_path: Path) -> None:
    values = ("1e-4", "1e-3", "1e-2", "1e-1", "1", "10")
    sweep = make_sweep(tmp_path / "my sweep", *({"lr": value} for value in values))
    make_run(sweep, 0, 2.4)
    make_run(sweep, 1, 2.0, "stopped", step=4)
    long = "RuntimeError: NaN in\n  gradients | " + "x" * 200
    make_run(sweep, 2, 9.9, "failed", step=2, error=long, rank=3)
    make_run(sweep, 3, 3.0, "running")
    (sweep / "point-4").mkdir()
    (sweep / "point-4" / "status.json").write_bytes(b"\xff{garbage")
    done = report(sweep)
    assert done.returncode == 1, done.stderr
    table = done.stdout.split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(values) and len(set(map(len, table))) == 1
    assert "rank 3: RuntimeError: NaN in gradients \\| x" in table[4] and "..." in table[4]
    for said in (
        "1 of 6 points finished",
        "best: lr=1e-4",
        "  stopped: lr=1e-3\n",
        "  failed: lr=1e-2\n",
        "  running: lr=1e-1\n",
        "  unreadable: lr=1\n",
        "  missing: lr=10\n",
        f"./launch/submit.py --rerun '{sweep}'\n",
    ):
        assert said in done.stdout
    written = rows(sweep)
    assert written[2]["error"].endswith("x" * 200)
    assert "cannot be read as JSON" in written[4]["error"]
    assert "never started" in written[5]["error"]
    assert (sweep / "sweep.png").stat().st_size > 5000


def test_odd_names_and_losses_do_not_disturb(tmp_path: Path) -> None:
    names = ("a|b", "_c $d{ \\frac", "line\nbreak", "\N{GREEK SMALL LETTER LAMDA}", "x" * 300)
    sweep = make_sweep(tmp_path, *({"moa-dictionary": name} for name in names))
    make_run(sweep, 0, 2.0)
    make_run(sweep, 1, math.nan)
    make_run(sweep, 2, 2.5, validation_loss="much", rank=None, step=None)
    make_run(sweep, 3, math.inf)
    for events in (sweep / "point-0" / "tensorboard").iterdir():
        events.write_bytes(events.read_bytes()[:-7])  # as a killed run leaves them
    (sweep / "point-4").write_text("no folder")
    done = report(sweep)
    assert done.returncode == 1, done.stderr
    assert "best: moa-dictionary=a|b, validation loss 2.0000" in done.stdout
    assert "| moa-dictionary=a\\|b " in done.stdout and " nan " in done.stdout
    assert "missing: moa-dictionary=xxx" in done.stdout
    assert rows(sweep)[2]["moa-dictionary"] == "line\nbreak"


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ([{"lr": "1e-3"}, {"lr": "2e-3"}], "lr"),
        ([{"moa-gate": "tanh"}, {"moa-gate": "sigmoid"}], None),
        ([{"moa-gate": g, "lr": v} for g in ("tanh", "sigmoid") for v in ("1", "2")], "lr"),
        ([{"lr": v, "seed": s} for v in ("1", "2") for s in ("1", "2")], "lr"),
        ([{"moa-gate": "tanh", "bf16": "true"}, {"moa-gate": "tanh", "bf16": "false"}], None),
        ([{"a": "1", "b": "2", "c": "3"}, {"a": "2", "b": "2", "c": "3"}], None),
        ([{"lr": "1e-3"}, {"weight-decay": "0.1"}], None),
        ([{"lr": "0"}, {"lr": "-1"}], "lr"),
        ([{}], None),
    ],
)
def test_numbers_make_an_axis(
    tool: ModuleType, tmp_path: Path, settings: list[dict[str, str]], scale: str | None
) -> None:
    for index, _ in enumerate(settings[1:]):
        make_run(tmp_path, index, 2.0 + index)
    sweep = tool.read_sweep(make_sweep(tmp_path, *settings))
    assert sweep.scale == scale
    tool.draw(sweep, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    if scale is not None and len(sweep.keys) == 2:
        other = next(key for key in sweep.keys if key != scale)
        names = [f"{other}={point[other]}" for point in settings]
        lines = tool._lines(sweep, scale)
        assert list(lines) == list(dict.fromkeys(names))
        assert [x for x, _ in lines[names[0]]] == [1.0, 2.0]


def test_without_validation_the_training_loss_is_compared(tool: ModuleType, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, {"lr": "1"}, {"lr": "2"})
    for index, loss in enumerate((2.5, 2.4)):
        make_run(sweep, index, loss, validation_loss=None)
    assert "best: lr=2, training loss 2.4100" in report(sweep).stdout


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "sweep.json cannot be read (No such file or directory): give the folder"),
        ("{", "is no JSON"),
        ("[]", "describes no sweep"),
        ('{"recipe": "tiny-moe", "points": []}', "0 points"),
        ('{"recipe": "tiny-moe", "points": [{"index": 0}]}', "KeyError: 'run_dir'"),
    ],
)
def test_a_folder_that_is_no_sweep_is_refused(
    tmp_path: Path, text: str | None, reason: str
) -> None:
    if text is not None:
        (tmp_path / "sweep.json").write_text(text)
    done = report(tmp_path)
    assert done.returncode == 78
    assert str(tmp_path / "sweep.json") in done.stderr and reason in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ([] if text is None else ["sweep.json"])


def test_two_points_of_one_name_are_refused(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 points with 1 different names"):
        tool.read_sweep(make_sweep(tmp_path, {"lr": "1"}, {"lr": "1"}))


def test_help_shows_how_to_call_it() -> None:
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "tools/report_sweep.py runs/" in done.stdout
