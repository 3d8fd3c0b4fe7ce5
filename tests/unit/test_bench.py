"""tools/bench.py at tiny sizes: its report, its refusals, its check before any number."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moa_megatron import op
from tools.benchmarks import op as benchmark
from tools.benchmarks import runs, step, timing

ROOT = Path(__file__).parents[2]
SMALL = ["--variants", "bi", "--rows", "64", "--width", "64", "--repeats", "2"]
# The baseline then runs in plain PyTorch: building it takes longer than all tests here.
NO_COMPILER = {**os.environ, "CXX": "/nowhere/c++", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench", ROOT / "tools/bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bench(*words: str) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    command = [sys.executable, "tools/bench.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=NO_COMPILER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done


def check_environment(found: dict[str, Any]) -> None:
    names = {"device", "processor", "threads", "torch", "triton", "compiler", "commit"}
    assert names <= set(found["environment"])
    assert found["environment"]["threads"] == 1


def test_op(tmp_path: Path) -> None:
    files = [str(tmp_path / "new" / "op.json"), str(tmp_path / "op.png")]
    words = ["--op", *SMALL, "--dtype", "fp32", "bf16", "--weighted"]
    found, done = bench(*words, "--json", files[0], "--chart", files[1])
    check_environment(found)
    assert json.loads(Path(files[0]).read_text()) == found
    assert Path(files[1]).stat().st_size > 5000
    assert "torch.compile cannot build the baseline" in done.stderr
    assert (found["mode"], found["allocator"], found["repeats"]) == ("op", "retained", 2)
    assert [row["dtype"] for row in found["results"]] == ["fp32", "bf16"]
    for row in found["results"]:
        assert (row["variant"], row["rows"], row["width"]) == ("bi", 64, 64)
        for pass_ in ("forward", "backward", "both"):
            assert 0 < row["ratio"][pass_]["min"] <= row["ratio"][pass_]["median"]
            assert row[f"{pass_}_ms"] > 0 and row["fixed"]["eager"][f"{pass_}_ms"] > 0
        assert row["copy_share"]["forward"]["median"] > 0
        assert set(row["errors"]) == {"hidden", "grad_preact", "grad_logits", "grad_weight"}
        assert row["target"].startswith(("met", "missed"))
    size, gates = 64 * 64 * 4, 64 * 15 * 4  # 14 logits and a routing weight
    moved = {"forward": 3 * size + gates, "backward": 5 * size + 2 * gates}
    assert found["results"][0]["bytes"] == moved
    assert found["results"][0]["memory"]["bi"]["saved_bytes"] == 2 * size + gates


def test_layer(tmp_path: Path) -> None:
    chart = tmp_path / "layer.png"
    found, _ = bench("--layer", *SMALL, "--hidden-size", "32", "--chart", str(chart))
    check_environment(found)
    assert chart.stat().st_size > 5000
    assert [row["kind"] for row in found["results"]] == ["dense", "expert"]
    for row in found["results"]:
        assert row["best"] == "megatron"
        assert 0 < row["ratio"]["both"]["min"] <= row["ratio"]["both"]["max"]
        assert set(row["parts"]) == set(row["share"]) == {"gate", "mixture", "fc1", "fc2"}
        assert set(row["folding"]) == {"folded", "padded"}
        assert all(row["memory"][name]["saved_bytes"] > 0 for name in ("bi", "megatron"))


def test_a_wrong_result_gives_no_numbers(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = op.mixture

    def wrong(*words: Any) -> Tensor:
        return right(*words) * 1.01

    monkeypatch.setattr(op, "mixture", wrong)
    words = ["--op", *SMALL, "--dtype", "fp32", "--backend", "reference"]
    assert tool.main(words) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    message = printed.err.splitlines()[-1]
    assert "bi fp32 64 x 64: relative RMS error of hidden 1.0e-02, bound 1e-05" in message


@pytest.mark.parametrize(("least", "code"), [("0.9", 0), ("0.96", 1)])
def test_a_missed_target_is_said_and_fails(
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    least: str,
    code: int,
) -> None:
    """Throughput, so the inverse of the step times' ratio."""

    def timed(options: Any, side: str, *more: str) -> runs.Run:
        line = "iteration 3/ 3 | elapsed time per iteration (ms): {}\n"
        return runs.Run(0, 3 * line.format({"fixed": 95.0, "moa": 100.0}[side]), 1.0)

    monkeypatch.setattr(step, "timed_run", timed)
    monkeypatch.setattr(step, "start_up", lambda *_: {"megatron": 1.0, "moa_megatron": 1.0})
    words = ["--step", "--flags=--mock-data", "--pairs", "1", "--at-least", f"moa={least}"]
    assert tool.main(words) == code
    *printed, last = capsys.readouterr().out.splitlines()
    said = f"moa has 0.9500 of fixed's throughput, at least {least} is wanted"
    assert f"target {'missed' if code else 'met'}: {said}" in printed
    target = {"at_least": float(least), "reached": pytest.approx(0.95), "met": not code}
    assert json.loads(last)["targets"] == {"moa": target}


def test_help_shows_examples_of_every_mode(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--help"]) == 0
    text = capsys.readouterr().out
    for mode in ("op", "layer", "experts", "step", "static"):
        assert f"tools/bench.py --{mode}" in text
        with pytest.raises(SystemExit) as ended:
            tool.main([f"--{mode}", "--help"])
        assert ended.value.code == 0
        assert f"examples:\n  tools/bench.py --{mode}".replace(" --step", "") in (
            capsys.readouterr().out
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--op", "--variants", "bx"],
            "--variants 'bx' is unknown: choose from type1, one, bi, qd",
        ),
        (["--op", "--dtype", "fp8"], "--dtype 'fp8' is unknown: choose from fp32, bf16, fp16"),
        (["--layer", "--kinds", "moe"], "--kinds 'moe' is unknown: choose from dense, expert"),
        (["--op", "--rows", "0"], "--rows 0: must be positive"),
        (
            ["--experts", "--variants", "type1"],
            "--variants 'type1' is unknown: choose from one, bi, qd",
        ),
        (["--experts", "--experts-per-rank", "0"], "--experts-per-rank 0: must be positive"),
        (
            ["--experts", "--fp8", "tensorwise", "--device", "cpu"],
            "--fp8 tensorwise: needs Transformer Engine, on a GPU",
        ),
        (["--step", "--at-least", "moa"], "--at-least moa: needs a number, as in moa=0.96"),
        (["--step", "--at-least", "fixed=1"], "--at-least 'fixed' is unknown: choose from moa"),
        (["--op", "--layer"], "--op and --layer: one mode at a time"),
    ],
)
def test_refusals_are_one_line(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert tool.main(words) == 78
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"refused: {message}\n")


def test_contenders_take_turns_and_ratios_are_of_one_round() -> None:
    order: list[str] = []
    contenders = {n: timing.Contender(lambda n=n: order.append(n)) for n in "ab"}  # type: ignore[misc]
    times = timing.race(contenders, 3, timing.Clock(torch.device("cpu")))
    assert "".join(order) == "ab" * 5, "two rounds of warm-up"
    assert [len(times[n].forward) for n in "ab"] == [3, 3]
    assert timing.ratio([1, 2, 9], [1, 1, 3]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_verdict() -> None:
    shares = {"forward": {"median": 0.95}, "backward": {"median": 0.5}}
    row: dict[str, Any] = {"device": "cpu", "variant": "bi", "copy_share": shares}
    row["ratio"] = {"both": {"median": 1.2}}
    assert benchmark.verdict(row) == "met (<= 1.25)"
    assert benchmark.verdict(row | {"variant": "qd"}) == "-"
    assert benchmark.verdict(row | {"device": "cuda"}) == "missed: 1.20 > 1.10, backward 50% < 80%"
    assert math.isnan(timing.relative_rms(torch.tensor([math.nan]), torch.ones(1)))
