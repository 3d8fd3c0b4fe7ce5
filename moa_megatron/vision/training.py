"""Batches and loss of masked autoencoders, as Megatron's training loop wants them.

The counterpart of ``moa_megatron.batches``: ``datasets_provider`` and ``forward_step`` fill the
same slots. The loader is DALI's, passed through by ``--dataloader-type external``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import broadcast_data
from megatron.training import get_args, get_tensorboard_writer, get_timers
from torch import Tensor

from moa_megatron import layer_statistics, ranges
from moa_megatron.vision.masking import visible_patches
from moa_megatron.vision.patches import normalised_targets, patchify
from moa_megatron.vision.scaling import scaling_from_args

LOSS = "mae loss"
INPUT_WAIT = "input wait"


class InputWait:
    """Share of training time that this rank spends waiting for images.

    Measured from one micro-batch to the next; the first one, which starts the pipeline, and the
    times of evaluation and of checkpoints behind it do not count.
    """

    def __init__(self) -> None:
        self.waited = self.elapsed = 0.0
        self.logged = -1
        self._last: tuple[float, float] | None = None
        self._started = False

    def note(self, began: float, ended: float) -> None:
        """A micro-batch of training was asked for and there, both ``time.perf_counter`` values."""
        if self._last is not None:
            self.waited += self._last[1]
            self.elapsed += began - self._last[0]
        self._last = (began, ended - began) if self._started else None
        self._started = True

    def pause(self) -> None:
        """Something else than training happens before the next micro-batch."""
        self._last = None

    @property
    def fraction(self) -> float | None:
        """None where nothing was measured."""
        return self.waited / self.elapsed if self.elapsed else None


input_wait = InputWait()


def forward_step(data_iterator: Iterator[dict[str, Tensor]] | None, model: Any) -> tuple[Any, Any]:
    """One micro-batch: predicted patches, and the function that turns them into a loss."""
    args = get_args()
    number = getattr(args, "curr_iteration", -1) + 1
    with ranges.step(number) if model.training else nullcontext():
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        batch = _batch(data_iterator, model.training, number)
        images, visible = batch["images"], batch["visible"]
        timers("batch-generator").stop()
        with layer_statistics.watching(number if model.training else 0):
            predicted = model(images, visible)
    return predicted, partial(loss_function, patchify(images, args.patch_dim), visible)


def with_visible(args: argparse.Namespace, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """A loader's batch with ``visible``, int64 [b, v]: patches that its samples' masks leave."""
    patches, samples = args.seq_length - 1, data["samples"].numpy()
    visible = visible_patches(args.seed, samples, patches, args.mae_mask_ratio)
    return {**data, "visible": visible}


def broadcast(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """``images`` [b, 3, h, w] and ``visible`` [b, v] of tensor-parallel rank 0, on all its ranks.

    Masks are made on the host from what the loader has there: asking the device for the samples
    would wait for all its work.
    """
    images = broadcast_data(["images"], data, torch.float32)
    return {**images, **broadcast_data(["visible"], data, torch.int64)}


def loss_function(
    patches: Tensor, visible: Tensor, predicted: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum over hidden patches of the mean squared error, and their number, as Megatron wants it.

    Args:
        patches: [b, L, pixels] of the normalised images.
        visible: int64 [b, v].
        predicted: [b, L, pixels], of patches with mean 0 and variance 1.
    """
    targets, _, _ = normalised_targets(patches)
    errors = (predicted.to(targets.dtype) - targets).square().mean(dim=-1)
    hidden = torch.ones_like(errors).scatter(1, visible, 0.0)
    loss, count = (errors * hidden).sum(), hidden.sum()
    report = torch.stack([loss.detach(), count])
    return loss, count.to(torch.int), {LOSS: report}


def _batch(
    data_iterator: Iterator[dict[str, Tensor]] | None, trains: bool, step: int
) -> dict[str, Tensor]:
    """``images`` and ``visible``: read on TP rank 0, broadcast over TP."""
    data: dict[str, Tensor] = {}
    if data_iterator is not None:
        began = time.perf_counter()
        data = with_visible(get_args(), next(data_iterator))
        if trains:
            input_wait.note(began, time.perf_counter())
            _log_wait(step)
        else:
            input_wait.pause()
    return broadcast(data)


def _log_wait(step: int) -> None:
    writer, args = get_tensorboard_writer(), get_args()
    share = input_wait.fraction
    if writer is None or share is None or step % args.tensorboard_log_interval:
        return
    if step != input_wait.logged:  # once for all micro-batches
        input_wait.logged = step
        writer.add_scalar(INPUT_WAIT, share, step)


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Endless loaders of training and validation images; called on TP rank 0 only."""
    del num_samples, vp_stage
    args = get_args()
    sizes = (args.micro_batch_size, args.eval_micro_batch_size)
    period = args.eval_iters * args.eval_global_batch_size
    valid = loader(args, "valid", sizes[1], 0, period) if args.eval_iters else None
    return loader(args, "train", sizes[0], args.consumed_train_samples, None), valid, None


def loader(
    args: argparse.Namespace,
    split: str,
    micro_batch: int,
    start: int,
    period: int | None,
    rank: int | None = None,
    ranks: int | None = None,
) -> Any:
    """This data-parallel rank's part of one split, from a position in the run on.

    Args:
        args: Megatron's namespace; ``moa_image_index`` names the indices.
        split: ``train``, with random crops, or ``valid``, with centred ones.
        micro_batch: images of a batch.
        start: samples consumed before.
        period: start over after so many samples: every evaluation sees the same images.
        rank: of data parallelism; default: this process's.
        ranks: their number.
    """
    rank = mpu.get_data_parallel_rank() if rank is None else rank
    ranks = mpu.get_data_parallel_world_size() if ranks is None else ranks
    size = (args.img_h, args.img_w)
    if args.mock_data:
        return _RandomImages(size, micro_batch, rank, ranks, start, period)
    from moa_megatron.vision.images import index
    from moa_megatron.vision.images.augment import Augmentation
    from moa_megatron.vision.images.loader import ImageLoader

    low, high = args.mae_crop_scale
    augment = Augmentation((low, high), flip=0.5 if args.mae_flip else 0.0)
    return ImageLoader(
        index.load(Path(args.moa_image_index[split])),
        seed=args.seed,
        size=size,
        micro_batch=micro_batch,
        rank=rank,
        ranks=ranks,
        start=start,
        period=period,
        augment=augment if split == "train" else None,
        crop_fraction=args.mae_eval_crop,
        threads=args.moa_image_threads or _threads(),
        device="cuda" if torch.cuda.is_available() else "cpu",
        scaling=scaling_from_args(args),
    )


def _threads() -> int:
    """This rank's share of the cores that it may use, and one more, as some always wait."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local) + 1


class _RandomImages:
    """Noise in the place of images, for ``--mock-data``; endless."""

    def __init__(
        self,
        size: tuple[int, int],
        micro_batch: int,
        rank: int,
        ranks: int,
        start: int,
        period: int | None,
    ) -> None:
        self.size, self.micro_batch, self.period = size, micro_batch, period
        self.next, self.stride = start + rank * micro_batch, micro_batch * ranks

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        first, self.next = self.next, self.next + self.stride
        first = first % self.period if self.period else first
        generator = torch.Generator().manual_seed(first)
        shape = (self.micro_batch, 3, *self.size)
        samples = torch.arange(first, first + self.micro_batch)
        images = torch.randn(shape, generator=generator, device="cpu")
        return {"images": images, "samples": samples, "ids": samples}
