"""Golden losses of the tiny recipes: a refactor must match them, a change of the mathematics must
record them anew, with the reason in its commit:

    python -m tests.e2e.test_golden
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from moa_megatron import telemetry
from moa_megatron.kernels import cpu_op
from tests.e2e.runs import ROOT, pretrain

GOLDEN = ROOT / "tests" / "golden"
RECIPES = ["tiny-dense", "tiny-moe"]
STEPS = 8
# Vector width and compiler decide the order of sums, so the last digits belong to one machine; in
# tiny-moe a token may then choose another expert (1.0e-4 between the kernels and the reference).
OTHER_PROCESSOR = 5e-4


def losses(recipe: str, folder: Path) -> list[float]:
    """Training losses of the first steps on random tokens, one thread."""
    words = ["--mock-data", "--train-iters", str(STEPS), "--eval-iters", "0", "--log-interval", "1"]
    done = pretrain(folder, recipe, *words, "--tensorboard-log-interval", "1")
    assert done.code == 0
    curves = telemetry.read_scalars(folder / "tensorboard", (telemetry.TRAIN_LOSS,))
    return curves[telemetry.TRAIN_LOSS].values


def processor() -> str:
    """What decides the last digits: vector instructions, the vendor MKL looks at, the compiler."""
    vendors = re.findall(r"vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text())
    words = [torch.backends.cpu.get_cpu_capability(), vendors[0] if vendors else "unknown"]
    return " ".join([*words, cpu_op.compiler_version() or "no compiler"])


def record(recipe: str, folder: Path) -> dict[str, Any]:
    return {"processor": processor(), "torch": torch.__version__, "losses": losses(recipe, folder)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_match_the_record(recipe: str, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"{recipe}.json").read_text())
    now = losses(recipe, tmp_path / "run")
    assert len(now) == len(golden["losses"]) == STEPS
    worst = max(abs(a / b - 1) for a, b in zip(now, golden["losses"], strict=True))
    print(f"{recipe}: largest relative difference {worst:.1e}")
    if processor() == golden["processor"]:
        assert now == golden["losses"]
    assert worst <= OTHER_PROCESSOR


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in RECIPES:
        with tempfile.TemporaryDirectory() as scratch:
            found = record(name, Path(scratch, "run"))
        (GOLDEN / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
