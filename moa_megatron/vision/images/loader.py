"""Batches of images for Megatron's ``--dataloader-type external``.

What a batch holds depends on (seed, positions) alone, so a loader that starts at a position gives
what one that ran to it gives: the run's ``consumed_train_samples`` is all there is to save, at any
number of ranks.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moa_megatron.vision.images import checking
from moa_megatron.vision.images.augment import (
    Augmentation,
    centre_windows,
    crop_windows,
    flips,
)
from moa_megatron.vision.images.index import WHOLE_FILE, ImageIndex
from moa_megatron.vision.images.order import image_ids
from moa_megatron.vision.images.pipeline import Encoded, Pipeline
from moa_megatron.vision.images.reading import Reader
from moa_megatron.vision.scaling import IMAGENET, Scaling

Batch = dict[str, Tensor]

_READERS = 16  # threads: they wait for the file system, and hardly compute
_READ_AHEAD = 3  # batches read before they are decoded
_SHOWN = 10  # images that an error names
_READY = 2  # finished batches that wait


class ImagesChangedError(OSError):
    """Images vanished or changed after they were indexed; the message names them."""


@dataclass(frozen=True)
class _Plan:
    """A batch before its images are read; all [b]."""

    samples: NDArray[np.int64]
    ids: NDArray[np.int64]
    reads: list[Future[NDArray[np.uint8]]]


class ImageLoader:
    """An endless iterator over the batches of one data-parallel rank.

    Batch k holds samples start + k * micro_batch * ranks + rank * micro_batch + [0 .. micro_batch),
    as Megatron's own sampler deals them out. A thread prepares batches ahead; nothing is started,
    and no file opened, before the first one is asked for.

    Args:
        index: of the images.
        seed: of order and augmentation.
        size: height and width of the images given.
        micro_batch: images of a batch.
        rank, ranks: of the data-parallel group.
        start: samples that the run has consumed.
        period: sample numbers are taken modulo this, so that every evaluation sees the same images.
        augment: random crop and flip; None: the largest centred window, times `crop_fraction`.
        threads: that decode, and as many that resize; a few more than cores serve best.
        device: "cpu", or the CUDA device that decodes and gets the images.
        crop_fraction: of both sides of the centred window; MAE evaluates with 224/256.
        scaling: normalises pixels.

    Yields:
        images: [b, 3, h, w], float32, normalised, on the device. On the host: ids [b], rows of the
        index; samples [b], positions after the modulo; labels [b]. All int64.
    """

    def __init__(
        self,
        index: ImageIndex,
        *,
        seed: int,
        size: tuple[int, int],
        micro_batch: int,
        rank: int,
        ranks: int,
        start: int,
        period: int | None,
        augment: Augmentation | None,
        threads: int,
        device: str,
        crop_fraction: float = 1.0,
        scaling: Scaling = IMAGENET,
    ) -> None:
        self.index, self.seed, self.size, self.augment = index, seed, size, augment
        self.micro_batch, self.period, self.crop_fraction = micro_batch, period, crop_fraction
        self.threads, self.device, self.scaling = threads, torch.device(device), scaling
        if self.device.type == "cuda" and self.device.index is None:
            # The thread that prepares batches has a current device of its own, the first.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.waited = 0.0  # seconds in which the caller waited for a batch
        self.batches = 0  # that the caller got
        self._first, self._step = start + rank * micro_batch, micro_batch * ranks
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(_READY)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            ImagesChangedError: images vanished or changed after they were indexed.
        """
        if self._stop.is_set():
            raise StopIteration
        began = time.perf_counter()
        if self._thread is None:
            self._start()
        batch = self._ready.get()
        if isinstance(batch, BaseException):
            self.close()
            raise batch
        if self.device.type == "cuda":
            # Made on another stream: its memory must not be given away before this one is done.
            batch["images"].record_stream(torch.cuda.current_stream(self.device))
        self.waited += time.perf_counter() - began
        self.batches += 1
        return batch

    def _start(self) -> None:
        # Before the next line, so that at exit DALI takes its pipelines down after our thread.
        import nvidia.dali  # noqa: F401

        atexit.register(self.close)
        self._thread = threading.Thread(target=self._run, name="images", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the threads. The iterator is exhausted then."""
        self._stop.set()
        atexit.unregister(self.close)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            with ThreadPoolExecutor(_READERS, "read") as readers:
                try:
                    self._produce(readers)
                finally:
                    readers.shutdown(wait=False, cancel_futures=True)
        except BaseException as error:  # whatever it is, it belongs to who waits for the batch
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _produce(self, readers: ThreadPoolExecutor) -> None:
        reader, number = Reader(), 0
        waiting: deque[_Plan] = deque()  # being read
        decoding: deque[_Plan] = deque()

        def source() -> Encoded:
            nonlocal number
            while len(waiting) <= _READ_AHEAD:
                waiting.append(self._plan(number, reader, readers))
                number += 1
            plan = waiting.popleft()
            decoding.append(plan)
            return self._encoded(plan)

        device = str(self.device)
        pipeline = Pipeline(source, self.size, self.micro_batch, self.threads, device, self.scaling)
        try:
            while not self._stop.is_set():
                try:
                    images = pipeline.next()
                except RuntimeError as error:
                    raise self._explained(decoding, error) from error
                plan = decoding.popleft()
                self._put(
                    {
                        "images": images,
                        "ids": torch.from_numpy(plan.ids),
                        "samples": torch.from_numpy(plan.samples),
                        "labels": torch.from_numpy(self.index.label[plan.ids]),
                    }
                )
        finally:
            pipeline.close()

    def _plan(self, number: int, reader: Reader, readers: ThreadPoolExecutor) -> _Plan:
        samples = self._first + number * self._step + np.arange(self.micro_batch)
        if self.period is not None:
            samples %= self.period
        ids = image_ids(self.seed, samples, len(self.index))
        places = [self._place(int(row)) for row in ids]
        reads = [readers.submit(reader.read, p.path, p.offset, p.size) for p in places]
        return _Plan(samples, ids, reads)

    def _place(self, row: int) -> checking.Place:
        index = self.index
        path, offset = index.containers[index.container[row]], int(index.offset[row])
        return checking.Place(
            index.path(row) if offset == WHOLE_FILE else path, offset, int(index.size[row])
        )

    def _encoded(self, plan: _Plan) -> Encoded:
        """Waits for the bytes, and chooses the windows."""
        data, failures = [], {}
        for row, read in zip(plan.ids, plan.reads):
            try:
                data.append(read.result())
            except OSError as error:
                failures[self.index.path(row)] = error
        if failures:
            problems = {path: e.strerror or str(e) for path, e in failures.items()}
            # The cause's number tells a run whether it is the storage that failed.
            raise self._changed(problems) from next(iter(failures.values()))
        heights, widths = self.index.height[plan.ids], self.index.width[plan.ids]
        if self.augment is None:
            ratio = self.size[1] / self.size[0]
            windows = centre_windows(heights, widths, ratio, self.crop_fraction)
            return Encoded(data, windows, np.zeros(len(data), dtype=np.bool_))
        augment = self.augment
        windows = crop_windows(
            self.seed, plan.samples, heights, widths, augment.scale, augment.ratio
        )
        return Encoded(data, windows, flips(self.seed, plan.samples, augment.flip))

    def _explained(self, decoding: deque[_Plan], error: RuntimeError) -> Exception:
        """What is wrong with the images that DALI was given: it does not tell which one."""
        rows = [int(row) for plan in decoding for row in plan.ids]
        verdicts = checking.check([self._place(row) for row in rows], grey=True)
        problems = {}
        for row, verdict in zip(rows, verdicts):
            shape = (self.index.height[row], self.index.width[row])
            if isinstance(verdict, str):
                problems[self.index.path(row)] = verdict
            elif verdict != shape:
                problems[self.index.path(row)] = f"{verdict} high and wide, {shape} when indexed"
        if problems:
            return self._changed(problems)
        return RuntimeError(
            f"DALI failed at {len(rows)} images that can be decoded one by one, "
            f"{self.index.path(rows[0])} the first: {error}"
        )

    def _changed(self, problems: dict[str, str]) -> ImagesChangedError:
        shown = list(problems.items())[:_SHOWN]
        told = "\n".join(f"  {path}: {reason}" for path, reason in shown)
        if len(problems) > len(shown):
            told += f"\n  and {len(problems) - len(shown)} more"
        return ImagesChangedError(
            f"images vanished or changed after they were indexed:\n{told}\n"
            "restore them, or start again: the index is then built anew, and the order another"
        )
