"""tools/plan.py: its numbers agree with each other, its commands run, its refusals help."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import isolated

ROOT = Path(__file__).parents[2]


def tool() -> Any:
    """The tool as a module; it turns host mode on before it imports Megatron."""
    specification = importlib.util.spec_from_file_location("plan", ROOT / "tools" / "plan.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def printed(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert tool().main(list(words)) == 0
    return out.getvalue()


def planned(*words: str) -> dict[str, Any]:
    return json.loads(printed(*words, "--json"))  # type: ignore[no-any-return]


def refusal(*words: str) -> str:
    from moa_megatron.recipes import RefusedError

    with pytest.raises(RefusedError) as refused:
        tool().main(list(words))
    return str(refused.value)


def check_numbers_agree() -> None:
    plan = planned("moe-2b", "--gpus", "64", "--gpu", "h200", "--mfu", "0.25", "--price", "2")
    first = plan["layouts"][0]
    assert plan["parameters"] == {
        "total": 1_996_766_720,
        "active": 621_048_320,
        "gates": 192_000,
    }
    seconds = plan["flops_per_token"]["model"] * 512 * 1024 / (64 * 989e12 * 0.25)
    assert first["step_seconds"] == pytest.approx(seconds)
    assert first["gpu_hours"] == pytest.approx(seconds * 120_000 * 64 / 3600)
    assert first["cost"] == pytest.approx(2 * first["gpu_hours"])
    assert plan["flops"] == plan["flops_per_token"]["model"] * 120_000 * 512 * 1024
    for one in plan["layouts"]:
        sizes = one["layout"]
        assert sizes["tp"] * sizes["pp"] * sizes["cp"] * sizes["dp"] == 64
        memory = {k: v for k, v in one["memory"].items() if k not in ("total", "stage")}
        assert one["memory"]["total"] == pytest.approx(sum(memory.values()) + 3e9)
        assert one["fits"] == (one["memory"]["total"] <= 141e9)


def check_least_parallelism_comes_first() -> None:
    plan = planned("dense-0.12b", "--gpus", "8", "--gpu", "a100-40")
    assert plan["names"][0] == "DP 8" and plan["layouts"][0]["recompute"] == "none"
    text = printed("dense-0.12b", "--gpus", "8", "--gpu", "a100-40")
    assert "data parallelism alone" in text and "assumed" in text
    far = planned("moe-2b", "--gpus", "64", "--gpu", "h100")
    place = next(one for one in far["layouts"] if one["layout"]["ep"] == 32)
    assert "EP x ETP exceeds 8" in place["advice"][0] and place["fits"]
    assert far["layouts"].index(place) > len(far["layouts"]) // 2
    fixed = planned("moe-2b", "--gpus", "8", "--expert-model-parallel-size", "4")
    assert {one["layout"]["ep"] for one in fixed["layouts"]} == {4}
    assert "--expert-model-parallel-size=4" not in fixed["layouts"][0]["flags"]


def check_memory_makes_it_recompute_and_cut() -> None:
    big = ("moe-2b", "--gpus", "8", "--gpu", "a100-40", "--seq-length", "8192")
    plan = planned(*big, "--max-position-embeddings", "8192", "--micro-batch-size", "4")
    first = plan["layouts"][0]
    assert first["recompute"] in ("selective", "full") or first["use_distributed_optimizer"]
    assert any(one["layout"]["cp"] > 1 for one in plan["layouts"])
    text = refusal("moe-2b", "--gpus", "1", "--gpu", "a100-40", "--num-layers", "60")
    assert "needs" in text and "fits: --gpus" in text and "--gpu b200" in text


def check_list() -> None:
    from moa_megatron import recipes

    rows = json.loads(printed("--list", "--json", "--gpu", "h200"))
    assert [row["recipe"] for row in rows] == recipes.language_models()
    moe = next(row for row in rows if row["recipe"] == "moe-2b")
    assert moe["tokens"] == 120_000 * 512 * 1024 and moe["total"] == 1_996_766_720
    days = moe["flops"] / (989e12 * moe["mfu"]) / 86400
    assert moe["gpu_days"] == pytest.approx(days)
    assert "GPU-days on H200" in printed("--list", "--gpu", "h200")


def check_refusals() -> None:
    for words, message in (
        (("--gpus", "8"), "the recipe comes first"),
        (("moe-2b",), "--gpus None: say how many"),
        (("moe-2b", "--gpus", "12"), "no whole nodes of 8: use 8 or 16"),
        (("moe-2b", "--gpus", "8", "--gpu", "h1000", "--mfu", "40"), "--gpu h1000 is not known"),
        (("moe-2b", "--gpus", "8", "--gpu", "h1000", "--mfu", "40"), "--mfu 40.0: must be above 0"),
        (("moe-2b", "--gpus", "8", "--hiden-size", "4"), "did you mean '--hidden-size'"),
        (("moe-2b", "--gpus", "8", "--gpu", "a100-80", "--fp8-format", "hybrid"), "has no FP8"),
        (("moe-2b", "--gpus", "7", "--gpus-per-node", "7"), "no layout is legal"),
        (("moe-2b", "--gpus", "8", "--optimizer", "lion"), "--optimizer lion cannot be planned"),
    ):
        assert message in refusal(*words), words


def check_submit_takes_the_command() -> None:
    """The first choice passes submit.py's own dry run; Slurm's part is left out."""
    for words in (
        ("dense-0.12b", "--gpus", "16", "--mock-data"),
        ("moe-2b", "--gpus", "8", "--mock-data", "--pipeline-model-parallel-size", "2")
        + ("--expert-model-parallel-size", "2", "--recompute-granularity", "selective"),
    ):
        plan = planned(*words)
        command, *local = plan["commands"]
        assert bool(local) == (plan["gpus"] <= 8)
        with tempfile.TemporaryDirectory() as folder:
            sbatch = Path(folder, "sbatch")
            sbatch.write_text("#!/bin/sh\nexit 0\n")
            sbatch.chmod(0o755)
            done = subprocess.run(
                [sys.executable, *shlex.split(command), "--dry-run"],
                cwd=ROOT,
                env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stderr
        assert "would submit" in done.stdout, done.stdout


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_plan(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]


def test_exit_codes() -> None:
    command = [sys.executable, "tools/plan.py"]
    helped = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert helped.returncode == 0 and "tools/plan.py moe-2b --gpus 64" in helped.stdout
    wrong = subprocess.run([*command, "moe-3b", "--gpus", "8"], cwd=ROOT, capture_output=True)
    assert wrong.returncode == 78 and b"did you mean 'moe-2b'" in wrong.stderr
