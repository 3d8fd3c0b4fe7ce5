"""Runs that start from another model's checkpoint: HybridModel from GPTModel, MoA from fixed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moa_megatron import telemetry
from moa_megatron.vision.export import read_tensors
from tests.e2e.runs import SMALL_MOE, Outcome, pretrain

pytestmark = pytest.mark.slow
GPT = ["tiny-moe", *SMALL_MOE, "--moa-model", "gpt", "--moa-gate-scope", "expert"]
HYBRID = [*GPT[:-4], *GPT[-2:]]


def losses(outcome: Outcome) -> dict[int, float]:
    curve = telemetry.read_run(outcome.folder / "tensorboard", False)[telemetry.TRAIN_LOSS]
    return dict(zip(curve.steps, curve.values, strict=True))


def test_a_hybrid_model_goes_on_where_a_gpt_model_stopped(tmp_path: Path) -> None:
    """Optimiser state included: Adam's moments decide the steps after the first."""
    whole = pretrain(tmp_path / "gpt", *GPT)
    assert whole.code == 0
    load = ("--load", str(whole.folder / "checkpoints"), "--ckpt-step", "3")
    moved = pretrain(tmp_path / "hybrid", *HYBRID, *load)
    assert moved.code == 0 and "its blocks go into a HybridModel" in moved.output
    wanted, found = losses(whole), losses(moved)
    assert sorted(found) == [4, 5, 6]
    assert found == pytest.approx({step: wanted[step] for step in found}, rel=1e-5)
    deeper = pretrain(tmp_path / "deeper", *HYBRID, *load, "--num-layers", "3")
    assert deeper.code == 78 and "layers: checkpoint" in deeper.output


def test_a_mixture_starts_from_a_baseline(tmp_path: Path) -> None:
    words = ("tiny-moe", *SMALL_MOE, "--lr", "1e-3")
    baseline = pretrain(tmp_path / "fixed", *words, "--moa-mixing", "fixed")
    load = ("--load", str(baseline.folder / "checkpoints"))
    refused = pretrain(tmp_path / "moa", *words, *load)
    assert refused.code == 78 and "moa_mixing: checkpoint fixed, this run moa" in refused.output
    assert "--finetune" in refused.output
    # One step without effect: what is saved is what was loaded.
    still = ("--finetune", "--train-iters", "1", "--lr", "0", "--min-lr", "0")
    moved = pretrain(tmp_path / "moa", *words, *load, *still)
    assert moved.code == 0 and "they start as initialised" in moved.output
    old, new = (weights(each, step) for each, step in ((baseline, 6), (moved, 1)))
    gates = {name for name in new if "moa_gate" in name}
    assert gates and new.keys() - gates == old.keys()
    assert all(torch.equal(new[name], value) for name, value in old.items())
    assert all(0.01 < new[name].std() < 0.03 for name in gates), "as initialised"


def weights(run: Outcome, step: int) -> dict[str, torch.Tensor]:
    return read_tensors(run.folder / "checkpoints" / f"iter_{step:07d}")
