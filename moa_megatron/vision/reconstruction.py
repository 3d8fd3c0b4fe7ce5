"""Pictures of what the model paints, at each evaluation: in the run's folder and TensorBoard."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.training import get_tensorboard_writer
from torch import Tensor

from moa_megatron.vision import training
from moa_megatron.vision.patches import normalised_targets, patchify
from moa_megatron.vision.pictures import reconstruction_grid, write_picture
from moa_megatron.vision.scaling import scaling_from_args

logger = logging.getLogger(__name__)

_FOLDER = "reconstructions"


def drawing(args: argparse.Namespace, folder: Path) -> Callable[[list[Any]], None] | None:
    """What Megatron's evaluation calls with the model; None where no pictures are wanted.

    Args:
        args: Megatron's namespace.
        folder: of the run.
    """
    if not args.mae_pictures or not args.eval_iters:
        return None
    batch: list[dict[str, Tensor]] = []

    def draw(model: list[Any]) -> None:
        # The last rank has TensorBoard's writer; its tensor-parallel group computes.
        if mpu.get_data_parallel_rank() != mpu.get_data_parallel_world_size() - 1:
            return
        if not batch:
            batch.append(_images(args))
        picture = _picture(args, model[0], **batch[0])
        writer = get_tensorboard_writer()
        if writer is None:
            return
        # An evaluation may come before any training, of a run that has been loaded.
        step = max(int(getattr(args, "curr_iteration", -1)) + 1, int(args.iteration))
        writer.add_image(_FOLDER, picture, step, dataformats="HWC")
        try:
            (folder / _FOLDER).mkdir(exist_ok=True)
            write_picture(picture, folder / _FOLDER / f"step_{step:07d}.png")
        except OSError as error:  # a picture is not worth a run
            logger.warning("the reconstructions of step %d could not be written: %s", step, error)

    return draw


def newest(folder: Path) -> str | None:
    """The last picture of a run."""
    found = sorted((folder / _FOLDER).glob("step_*.png"))
    return str(found[-1]) if found else None


def _images(args: argparse.Namespace) -> dict[str, Tensor]:
    """The first images of validation, with masks that stay the same: on all TP ranks alike."""
    data: dict[str, Tensor] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        count = args.mae_pictures
        reader = training.loader(args, "valid", count, 0, count, rank=0, ranks=1)
        data = training.with_visible(args, next(reader))
        getattr(reader, "close", lambda: None)()
    return training.broadcast(data)


def _picture(args: argparse.Namespace, model: Any, images: Tensor, visible: Tensor) -> Any:
    with torch.no_grad():
        predicted = model(images, visible)
    _, mean, std = normalised_targets(patchify(images, args.patch_dim))
    return reconstruction_grid(
        *(tensor.float().cpu() for tensor in (images, predicted, mean, std)),
        visible=visible.cpu(),
        patch=args.patch_dim,
        scaling=scaling_from_args(args),
    )
