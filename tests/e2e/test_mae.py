"""Masked autoencoders end to end: what a user sees; runs that stop, resume and change layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from moa_megatron import telemetry
from tests.e2e.runs import SMALL_MAE, Outcome, local, pretrain


def losses(run: Outcome) -> list[float]:
    curves = telemetry.read_run(run.folder / "tensorboard", tested=False)
    return curves[telemetry.TRAIN_LOSS].values


def tensors(run: Outcome) -> dict[str, torch.Tensor]:
    whole = run.folder / "whole.pt"
    dcp_to_torch_save(run.status["checkpoint"], whole)
    state = torch.load(whole, weights_only=False)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return pretrain(tmp_path_factory.mktemp("mae") / "whole", "tiny-mae", *SMALL_MAE)


def test_a_finished_run_shows_what_it_saw(finished: Outcome) -> None:
    assert finished.code == 0
    for text in ("75% of 49 patches hidden", "4,000 images", "images/s", "finished at step 6 of 6"):
        assert text in finished.output, text
    assert "PPL" not in finished.output and "tokens" not in finished.output
    status = finished.status
    assert 0 < status["validation_loss"] < 3 and status["loss_unit"] == "squared error"
    assert 0 <= status["input_wait"] <= 1
    grid = np.asarray(Image.open(status["reconstruction"]).convert("RGB"))
    assert Path(status["reconstruction"]).name == "step_0000006.png"
    assert grid.std() > 20, "an empty picture"
    (events,) = (finished.folder / "tensorboard").glob("events*")
    assert b"reconstructions" in events.read_bytes()
    tags = telemetry.read_scalars(finished.folder / "tensorboard", ("input wait",))
    assert tags["input wait"].steps[-1] == 6
    statistics = telemetry.read_statistics(finished.folder / "tensorboard")
    layers = {tag.split("/")[1] for tag in statistics}
    assert {"layer_01", "layer_02", "decoder_01"} <= layers


def test_stop_and_resume_equals_the_run_that_never_stopped(
    finished: Outcome, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    assert pretrain(folder, "tiny-mae", *SMALL_MAE, "--exit-interval", "3").code == 75
    resumed = pretrain(folder, "tiny-mae", *SMALL_MAE)
    assert resumed.code == 0 and resumed.status["step"] == 6
    assert losses(resumed) == losses(finished)
    ours, theirs = tensors(resumed), tensors(finished)
    assert ours.keys() == theirs.keys() and any("exp_avg" in key for key in ours)
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert resumed.status["validation_loss"] == finished.status["validation_loss"]


@pytest.mark.slow
def test_other_layouts_see_the_same_images(finished: Outcome, tmp_path: Path) -> None:
    """Started on one rank and continued on two, which differs by rounding alone."""
    folder = tmp_path / "grown"
    words = ["tiny-mae", *SMALL_MAE, "--use-distributed-optimizer"]
    assert pretrain(folder, *words, "--exit-interval", "3").code == 75
    grown = local(folder, *words, NPROC="2")
    assert grown.code == 0 and "continues from" in grown.output
    assert losses(grown) == pytest.approx(losses(finished), rel=1e-3)


@pytest.mark.slow
def test_two_data_parallel_ranks_equal_one(finished: Outcome, tmp_path: Path) -> None:
    words = ["tiny-mae", *SMALL_MAE, "--use-distributed-optimizer"]
    pair = local(tmp_path / "pair", *words, NPROC="2")
    assert pair.code == 0
    assert losses(pair) == pytest.approx(losses(finished), rel=1e-3)


@pytest.mark.slow
def test_two_tensor_parallel_ranks_equal_one(finished: Outcome, tmp_path: Path) -> None:
    """From the same weights: ranks that share a matrix draw parts of it from their own streams."""
    words = ["tiny-mae", *SMALL_MAE, "--finetune", "--load", str(finished.folder / "checkpoints")]
    one = pretrain(tmp_path / "one", *words)
    pair = local(tmp_path / "pair", *words, "--tensor-model-parallel-size", "2", NPROC="2")
    assert (one.code, pair.code) == (0, 0)
    assert losses(pair)[0] == pytest.approx(losses(one)[0], rel=1e-5)
    assert losses(pair) == pytest.approx(losses(one), rel=1e-3)


def test_bad_images_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "train" / "class"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    for index in range(8):
        Image.fromarray(pixels).save(folder / f"good{index}.jpg")
    (folder / "empty.jpg").touch()
    data = ["--train-data-path", str(folder.parent), "--valid-data-path", str(folder.parent)]
    refused = pretrain(tmp_path / "run", "tiny-mae", *SMALL_MAE, *data)
    assert refused.code == 78 and not (tmp_path / "run").exists()
    assert "1 of 9 images are bad" in refused.output and "empty.jpg" in refused.output
    assert "--moa-max-bad-images" in refused.output and "Traceback" not in refused.output
