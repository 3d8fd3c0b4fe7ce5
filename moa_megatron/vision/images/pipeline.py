"""Encoded images and windows in, normalised float images out, by DALI.

On a GPU DALI does everything there. On a CPU it decodes, and only the window; torch resizes and
numpy normalises, image by image on a few threads: DALI's own CPU operators for that take twice as
long as decoding (docs/results/2026-11-22-images.md). Both filter linearly over the window's whole
pixels (antialiased) and round to 8 bits in between, as torchvision does; the outermost pixels
differ, for there DALI repeats the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moa_megatron.vision.scaling import Scaling

_BUFFERS = 2  # batches that DALI keeps ready


@dataclass(frozen=True)
class Encoded:
    """A batch before it is decoded.

    Args:
        data: encoded bytes of each image.
        windows: [b, 4], top, left, height, width in the image as it is displayed.
        mirrored: [b]
    """

    data: list[NDArray[np.uint8]]
    windows: NDArray[np.int32]
    mirrored: NDArray[np.bool_]


class Pipeline:
    """Decodes batches one after the other, ahead of being asked.

    Args:
        source: gives the batches, in their order; DALI asks ahead of `next`.
        size: height and width of the images that come out.
        batch: images of a batch.
        threads: that decode, and where there is no GPU as many that resize.
        device: "cpu" or a CUDA device.
        scaling: normalises pixels.
        in_dali: whether DALI also resizes and normalises; None: on a GPU. On a CPU for comparison.
    """

    def __init__(
        self,
        source: Callable[[], Encoded],
        size: tuple[int, int],
        batch: int,
        threads: int,
        device: str,
        scaling: Scaling,
        in_dali: bool | None = None,
    ) -> None:
        self._size, self._device = size, torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._in_dali = self._cuda if in_dali is None else in_dali
        self._dali = _dali_pipeline(
            source, size if self._in_dali else None, batch, threads, self._device, scaling
        )
        self._workers = threads
        self._threads = ThreadPoolExecutor(threads, "resize")
        scale = 1 / (255 * np.array(scaling.std))
        self._scale = scale.astype(np.float32)[:, None, None]
        self._shift = (255 * scale * np.array(scaling.mean)).astype(np.float32)[:, None, None]
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None

    def next(self) -> Tensor:
        """The next batch: [b, 3, h, w], float32, on the device, the caller's own.

        Raises:
            RuntimeError: an image cannot be decoded; the pipeline is of no use any more.
        """
        images, mirrored = self._dali.run()
        if self._cuda:
            return self._copied(images)
        if self._in_dali:
            return torch.from_numpy(np.array(images.as_tensor()))
        return self._finished(images, mirrored)

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(cancel_futures=True)
        del self._dali

    def _finished(self, images: Any, mirrored: Any) -> Tensor:
        mirror = np.asarray(mirrored.as_tensor())
        batch = np.empty((len(mirror), 3, *self._size), dtype=np.float32)

        def finish(first: int) -> None:
            for row in range(first, len(mirror), self._workers):
                image = torch.from_numpy(np.asarray(images[row])).permute(2, 0, 1)[None]
                image = functional.interpolate(image, self._size, mode="bilinear", antialias=True)
                pixels, out = image[0].numpy(), batch[row]
                # By numpy: torch would start a team of threads for each of these.
                np.multiply(pixels[..., ::-1] if mirror[row] else pixels, self._scale, out=out)
                np.subtract(out, self._shift, out=out)

        for _ in self._threads.map(finish, range(self._workers)):
            pass
        return torch.from_numpy(batch)

    def _copied(self, images: Any) -> Tensor:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        dense = images.as_tensor()
        # A stream of its own: on the default one the copy would wait for the training step.
        with torch.cuda.stream(self._stream):
            batch = torch.empty(dense.shape(), dtype=torch.float32, device=self._device)
            feed_ndarray(dense, batch, cuda_stream=self._stream)
        assert self._stream is not None
        self._stream.synchronize()
        return batch


def _dali_pipeline(
    source: Callable[[], Encoded],
    size: tuple[int, int] | None,
    batch: int,
    threads: int,
    device: torch.device,
    scaling: Scaling,
) -> Any:
    """DALI's graph: finished images of a size, or without one decoded windows; and `mirrored`."""
    from nvidia.dali import fn, pipeline_def, types

    cuda = device.type == "cuda"

    def feed() -> tuple[Any, ...]:
        encoded = source()
        start, shape = (np.ascontiguousarray(part) for part in np.split(encoded.windows, 2, axis=1))
        return encoded.data, start, shape, encoded.mirrored.astype(np.int32)

    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=(device.index or 0) if cuda else None,
        prefetch_queue_depth=_BUFFERS,
    )
    def graph() -> tuple[Any, Any]:
        data, start, shape, mirrored = fn.external_source(
            feed,
            num_outputs=4,
            dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
            ndim=[1, 1, 1, 0],
        )
        images = fn.decoders.image_slice(
            data,
            start=start,
            shape=shape,
            axis_names="HW",
            device="mixed" if cuda else "cpu",
            output_type=types.RGB,
        )
        if size is not None:
            images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
            images = fn.crop_mirror_normalize(
                images,
                mirror=mirrored,
                mean=[255 * mean for mean in scaling.mean],
                std=[255 * std for std in scaling.std],
                dtype=types.FLOAT,
                output_layout="CHW",
            )
        return images, mirrored

    pipeline = graph()
    pipeline.build()
    return pipeline
