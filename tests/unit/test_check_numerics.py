"""tools/check_numerics.py: sides, verdicts, refusals, what a log says. Runs are replaced here."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from moa_megatron import runstate, telemetry
from tools import check_numerics
from tools.benchmarks import grouped, runs
from tools.benchmarks.sides import NEEDS, SIDES, closed, suited

LOG = """\
[when] iteration        1/       4 | elapsed time per iteration (ms): 900.0 | throughput per GPU \
(TFLOP/s/GPU): 1.0 | lm loss: 8.3E+00 | tokens/s: 409 |
[when] iteration        2/       4 | elapsed time per iteration (ms): 800.0 | throughput per GPU \
(TFLOP/s/GPU): 2.0 | lm loss: 8.3E+00 | tokens/s: 538 |
[Rank 0] (after 2 iterations) memory (MB) | allocated: 10.00 | max allocated: 2048.00 | reserved: 9
[when] iteration        3/       4 | elapsed time per iteration (ms): 100.0 | throughput per GPU \
(TFLOP/s/GPU): 300.5 | lm loss: 8.3E+00 | tokens/s: 1,055 |
[when] iteration        4/       4 | elapsed time per iteration (ms): 120.0 | throughput per GPU \
(TFLOP/s/GPU): 299.5 | lm loss: 8.3E+00 | tokens/s: 1,035 |
"""


def test_a_log_tells_speed_and_memory_without_the_first_steps() -> None:
    run = runs.Run(0, LOG)
    assert (run.step_ms, run.tokens_per_s) == (110.0, 1045.0)
    assert run.flops_per_s == 300e12 and run.peak_bytes == 2 * 2**30
    silent = runs.Run(78, "refused: no corpus\nmore\n")
    assert silent.refusal == "no corpus"
    assert silent.step_ms is silent.tokens_per_s is silent.flops_per_s is silent.peak_bytes is None


def test_every_side_comes_after_what_it_is_held_against() -> None:
    names = list(SIDES)
    for name, side in SIDES.items():
        assert side.against is None or names.index(side.against) < names.index(name)
        assert (side.bound > 0) == (side.against is not None)
        assert set(side.needs) <= set(NEEDS)
    assert closed(["fp8-blockwise"]) == ["fp32", "bf16", "fp8-blockwise"]
    assert closed(["moa", "fp32"]) == ["fp32", "moa"]


def test_machine_and_recipe_choose_the_sides() -> None:
    host = suited(True, frozenset())
    assert {"fp32", "bf16", "grouped", "recompute-moe"} <= set(host)
    assert not {"fp8-delayed", "recompute-mlp", "no-fusion", "moa", "fixed"} & set(host)
    gpu = suited(False, frozenset({"engine"}))
    assert {"fp8-delayed", "recompute-mlp", "cuda-graphs"} <= set(gpu)
    assert not {"grouped", "no-fusion", "fp8-mxfp8"} & set(gpu)
    assert {"no-fusion", "fp8-mxfp8"} <= set(suited(False, frozenset({"engine", "apex", "mxfp8"})))


@pytest.mark.parametrize(("cuda", "apex"), [(True, True), (True, False), (False, True)])
def test_a_machine_without_apex_or_mxfp8_says_so(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, apex: bool
) -> None:
    def importable(name: str) -> bool:
        return apex and name == "fused_weight_gradient_mlp_cuda"

    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("moa_megatron.packages.importable", importable)
    monkeypatch.setattr(grouped, "has_engine", lambda: False)
    assert check_numerics.available() == ({"apex"} if cuda and apex else set())
    monkeypatch.setattr(grouped, "has_engine", lambda: True)
    monkeypatch.setattr(grouped, "recipes", lambda: ["tensorwise", "mxfp8"])
    assert check_numerics.available() >= {"engine", "mxfp8"}
    monkeypatch.setattr(grouped, "recipes", lambda: ["tensorwise", "blockwise"])
    assert "mxfp8" not in check_numerics.available()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Replaces training: each side ends at the given loss, or at an exit code and what it says."""

    def replace(**ends: Any) -> list[str]:
        names: list[str] = []

        def train(recipe: str, folder: Path, words: list[str], *, log: Path) -> runs.Run:
            names.append(folder.name)
            end = ends.get(folder.name.replace("-", "_"), 4.0)
            if isinstance(end, tuple):
                log.write_text(end[1])
                return runs.Run(*end)
            log.write_text(LOG)
            steps = int(words[words.index("--train-iters") + 1])
            with SummaryWriter(str(folder / "tensorboard")) as writer:
                for step in range(steps):
                    writer.add_scalar(telemetry.TRAIN_LOSS, 8.0 if step < steps - 2 else end, step)
            runstate.write_status(folder, "finished", 0)
            return runs.Run(0, LOG)

        monkeypatch.setattr(runs, "train", train)
        monkeypatch.setattr(check_numerics, "available", frozenset)
        return names

    return replace


def check(folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    code = check_numerics.main(["tiny-moe", "--steps", "20", "--out", str(folder), *words])
    file = folder / "numerics.json"
    rows = json.loads(file.read_text())["sides"] if file.exists() else []
    return code, {row["side"]: row for row in rows}


def test_losses_within_the_bounds_pass(
    trained: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = trained(fp32=3.984, recompute_moe=4.002)
    code, rows = check(tmp_path)
    assert code == 0 and sorted(names) == sorted(suited(True, frozenset()))
    assert rows["fp32"]["verdict"] == "reference"
    assert rows["bf16"]["difference"] == pytest.approx(0.016 / 3.984, rel=1e-4)
    assert rows["bf16"]["verdict"] == rows["recompute-moe"]["verdict"] == "within"
    assert rows["bf16"]["step_ms"] == 110.0 and rows["bf16"]["peak_bytes"] == 2 * 2**30
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert "bf16" in (tmp_path / "table.md").read_text()
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"[{len(names)}/{len(names)}]") for line in printed)
    assert json.loads(printed[-1])["recipe"] == "tiny-moe"


@pytest.mark.parametrize("loss", [4.03, 3.97, math.nan])
def test_a_loss_outside_its_bound_fails(
    trained: Callable[..., list[str]], tmp_path: Path, loss: float
) -> None:
    trained(fp32=4.0, bf16=loss)
    code, rows = check(tmp_path, "--sides", "bf16")
    assert code == 1 and rows["bf16"]["verdict"] == "outside"


def test_what_a_run_was_refused_for_is_said(
    trained: Callable[..., list[str]], tmp_path: Path
) -> None:
    trained(grouped=(78, "refused: no such product here\n"))
    code, rows = check(tmp_path / "all")
    assert code == 0 and rows["grouped"]["verdict"] == "refused"
    assert rows["grouped"]["problem"] == "refused: no such product here"
    assert rows["recompute-moe-act"]["verdict"] == "refused", "there is nothing to hold it against"
    code, rows = check(tmp_path / "one", "--sides", "grouped")
    assert code == 1 and rows["grouped"]["verdict"] == "failed", "it was asked for"


def test_nothing_to_compare_is_no_success(
    trained: Callable[..., list[str]], tmp_path: Path
) -> None:
    refused = (78, "refused: --global-batch-size=8 is too small\n")
    trained(**{name.replace("-", "_"): refused for name in SIDES})
    assert check(tmp_path / "all")[0] == 1
    trained(**{name.replace("-", "_"): refused for name in SIDES if name != "fp32"})
    assert check(tmp_path / "one")[0] == 1
    trained()
    assert check(tmp_path / "lone", "--sides", "fp32")[0] == 0


def test_what_chance_does_too_is_no_failure(
    trained: Callable[..., list[str]], tmp_path: Path
) -> None:
    trained(fp32=4.0, bf16=4.0, twin=3.97, grouped=4.05, recompute_moe_act=4.05)
    code, rows = check(tmp_path / "one")
    assert code == 0 and rows["grouped"]["verdict"] == "chance"
    trained(fp32=4.0, bf16=4.0, twin=3.97, grouped=4.07, recompute_moe_act=4.07)
    assert check(tmp_path / "two")[0] == 1
    trained(fp32=4.0, bf16=4.0, twin=math.nan, grouped=4.05, recompute_moe_act=4.05)
    assert check(tmp_path / "three")[0] == 1
    # Chance that does much excuses no more than 2 %.
    trained(fp32=4.0, bf16=4.0, twin=3.93, recompute_moe=4.079)
    code, rows = check(tmp_path / "four")
    assert code == 0 and rows["recompute-moe"]["verdict"] == rows["twin"]["verdict"] == "chance"
    trained(fp32=4.0, bf16=4.0, twin=3.93, recompute_moe=4.081)
    code, rows = check(tmp_path / "five")
    assert code == 1 and rows["recompute-moe"]["verdict"] == "outside"


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_stopped_check_leaves_what_it_has(
    trained: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    handler: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained()
    finishes, table = runs.train, tmp_path / "table.md"
    seen, ended = [], threading.Event()

    def train(recipe: str, folder: Path, words: list[str], *, log: Path) -> runs.Run:
        if folder.name == "fp32":
            return finishes(recipe, folder, words, log=log)
        deadline = time.monotonic() + 20
        while not table.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(table.read_text())
        os.kill(os.getpid(), signal.SIGTERM)
        ended.wait()
        return runs.Run(-9, "")

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "end_all", ended.set)
    with pytest.raises(SystemExit) as stopped:
        check(tmp_path, "--sides", "bf16", "twin")
    assert stopped.value.code == 143
    rows = json.loads((tmp_path / "numerics.json").read_text())["sides"]
    assert [row["verdict"] for row in rows] == ["reference", "unfinished", "unfinished"]
    assert len(seen) == 1 and "| 4.0000 |" in seen[0], "written when the first had finished"
    printed = capsys.readouterr().out
    assert "[1/3] fp32: loss 4.0000" in printed and table.read_text() in printed
    assert not check_numerics.passed([{**rows[1], "verdict": "within"}, rows[2]])
    os.kill(os.getpid(), signal.SIGTERM)  # `timeout` sends it twice


def test_fp8_aligns_the_widths_of_all(
    trained: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained()
    monkeypatch.setattr(check_numerics, "available", lambda: frozenset({"engine"}))
    check(tmp_path, "--sides", "fp8-blockwise")
    for name in ("fp32", "bf16", "fp8-blockwise"):
        words = json.loads((tmp_path / name / "command.json").read_text())
        assert words[words.index("--moa-align") + 1] == "64"


def test_a_failed_run_fails_and_shows_its_end(
    trained: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(fp32=(1, "start\nCUDA error: last words\n"))
    code, rows = check(tmp_path, "--sides", "bf16")
    assert code == 1 and rows["fp32"]["verdict"] == rows["bf16"]["verdict"] == "failed"
    assert "CUDA error: last words" in capsys.readouterr().out


def test_finished_runs_are_kept_and_others_refused(
    trained: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = trained()
    first = check(tmp_path, "--sides", "bf16")
    names.clear()
    assert check(tmp_path, "--sides", "bf16") == first and not names
    assert "kept from before, loss 4.0000" in capsys.readouterr().out
    assert check(tmp_path, "--seed", "7")[0] == 78
    assert "choose another --out" in capsys.readouterr().err and not names, "before any is trained"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sides", "fp7"], "--sides fp7: no such side; choose from fp32, bf16"),
        (
            ["--sides", "no-fusion"],
            "--sides no-fusion: needs Apex's fused_weight_gradient_mlp_cuda",
        ),
        (["--sides", "recompute-mlp"], "--sides recompute-mlp: needs a recipe without experts"),
        (["--stepz", "9"], "unrecognized arguments: --stepz 9"),
        (["--steps", "0"], "--steps 0: must be positive"),
        (["--jobs", "0"], "--jobs 0: must be positive"),
    ],
)
def test_refusals(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path / "new", *words)[0] == 78
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_an_unknown_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_numerics.main(["tiny-mo"]) == 78
    assert "recipe 'tiny-mo' does not exist" in capsys.readouterr().err
