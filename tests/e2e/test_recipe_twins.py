"""Every paper recipe trains 20 steps with its own code path, in a model small enough for a CPU."""

import math
from pathlib import Path

import pytest

from moa_megatron import recipes, telemetry
from tests.e2e.runs import pretrain

STEPS = 20
SHRUNKEN = [
    *("--mock-data", "--vocab-size", "256", "--num-layers", "2", "--hidden-size", "64"),
    *("--num-attention-heads", "1", "--seq-length", "32", "--micro-batch-size", "2"),
    *("--global-batch-size", "4", "--train-iters", str(STEPS), "--eval-interval", "10"),
    *("--eval-iters", "1", "--log-interval", "1", "--tensorboard-log-interval", "1"),
    *("--ffn-hidden-size", str(8 * 64 // 3)),
]
EXPERTS = [
    *("--num-experts", "8"),
    *("--moe-ffn-hidden-size", str(2 * 64 // 3)),
    *("--moe-shared-expert-intermediate-size", str(8 * 64 // 3)),
]
PAPER = [name for name in recipes.language_models() if not name.startswith("tiny")]


def expected_rates(recipe: str) -> list[float]:
    """Learning rates of the 20 steps: a twentieth of a recipe's warm-up, at least one step."""
    values = recipes.of_variant(recipes.load(recipe), {}, [])
    peak = float(values["lr"])
    warmup = max(1, round(values["lr_warmup_iters"] * STEPS / values["train_iters"]))

    def rate(step: int) -> float:
        if step <= warmup:
            return peak * step / warmup
        if "moe" in recipe:
            return peak * min(1.0, (STEPS - step) / (0.2 * STEPS))
        cosine = (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2
        return peak * (0.05 + 0.95 * cosine)

    # Megatron writes the rate after its scheduler has moved on.
    return [rate(step) for step in range(1, STEPS + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PAPER)
def test_twin_trains(recipe: str, tmp_path: Path) -> None:
    words = [*SHRUNKEN, *(EXPERTS if "moe" in recipe else [])]
    outcome = pretrain(tmp_path / "run", recipe, *words)
    assert outcome.code == 0 and outcome.status["step"] == STEPS
    folder = tmp_path / "run" / "tensorboard"
    curves = telemetry.read_scalars(folder, (telemetry.TRAIN_LOSS, "learning-rate"))
    losses = curves[telemetry.TRAIN_LOSS].values
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert curves["learning-rate"].values == pytest.approx(expected_rates(recipe), rel=1e-5)
