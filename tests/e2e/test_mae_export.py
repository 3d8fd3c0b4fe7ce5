"""A run's checkpoint, read back as a plain model, computes what Megatron has computed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moa_megatron.runstate import read_status
from moa_megatron.vision.export import read_run
from moa_megatron.vision.masking import visible_patches
from tests.e2e.runs import ROOT, environment

SMALL = [
    *("--mock-data", "--train-iters", "3", "--lr-warmup-iters", "1", "--save-interval", "3"),
    *("--eval-interval", "9", "--eval-iters", "1", "--micro-batch-size", "8"),
    *("--global-batch-size", "8", "--mae-pictures", "0"),
]


@pytest.mark.slow
def test_validation_loss_of_two_tensor_parallel_ranks(tmp_path: Path) -> None:
    # Ranks hold halves of W1 and of W2, and heads: all must be put together in order.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += ["-m", "moa_megatron.pretrain", "tiny-mae", "--run-dir", str(tmp_path / "run")]
    command += ["--tensor-model-parallel-size", "2", *SMALL]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    status = read_status(tmp_path / "run")
    assert status is not None and status["state"] == "finished", done.stdout + done.stderr
    pretrained = read_run(tmp_path / "run")
    args, model = pretrained.args, pretrained.model
    # What --mock-data evaluates on first (`vision.training`); here that is after training.
    images = torch.randn(8, 3, *model.shape.image, generator=torch.Generator().manual_seed(0))
    samples = torch.arange(8).numpy()
    visible = visible_patches(args.seed, samples, model.shape.num_patches, args.mae_mask_ratio)
    with torch.no_grad():
        loss = float(model(images, visible))
    assert loss == pytest.approx(status["validation_loss"], rel=2e-6)
