#!/usr/bin/env python3
"""Time the image loader against torch's DataLoader with Pillow: images a second, in turn.

Both read the same JPEG files of 500x375, cut from the photographs that scikit-learn ships, and make
float32 batches of them: random resized crop, flip, ImageNet's mean and deviation. Each runs in a
process of its own, at several numbers of workers; the best of each side are compared. Before,
both must give the same pixels for the same windows. "DALI alone" is our loader with DALI resizing
on the CPU, too. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from moa_megatron.vision.images import loader as loader_module  # noqa: E402
from moa_megatron.vision.images.augment import Augmentation  # noqa: E402
from moa_megatron.vision.images.building import build  # noqa: E402
from moa_megatron.vision.images.loader import ImageLoader  # noqa: E402
from moa_megatron.vision.images.pipeline import Pipeline  # noqa: E402
from moa_megatron.vision.scaling import IMAGENET  # noqa: E402
from tools.benchmarks import report  # noqa: E402

SIDES = ("ours", "DALI alone", "DataLoader")
SIDE = 224
TOLERANCE = 1.01 / 255  # of a value in [0, 1]: the two resizers round differently
EXAMPLE = """example:
  tools/benchmarks/images.py --images 512 --workers 1 2 3 4 --rounds 5
"""


class Rate(NamedTuple):
    """Images a second: of the clock, and of a core's work, which other programs disturb less."""

    wall: float
    core: float


class Folder(Dataset[Tensor]):
    """Files by Pillow, augmented as torchvision's RandomResizedCrop and its flip do it."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.mean = torch.tensor(IMAGENET.mean)[:, None, None]
        self.std = torch.tensor(IMAGENET.std)[:, None, None]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        with Image.open(self.paths[row]) as file:
            image = file.convert("RGB")
        return self.finished(image, self.window(image.width, image.height), random.random() < 0.5)

    def window(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        for _ in range(10):
            area = width * height * random.uniform(*Augmentation.scale)
            ratio = math.exp(random.uniform(*map(math.log, Augmentation.ratio)))
            wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < tall <= height:
                left, top = random.randint(0, width - wide), random.randint(0, height - tall)
                return left, top, left + wide, top + tall
        return 0, 0, width, height  # these files are neither wide nor tall

    def finished(self, image: Image.Image, window: tuple[int, int, int, int], flip: bool) -> Tensor:
        """Cut, resized, mirrored, normalised, [3, 224, 224]."""
        image = image.crop(window).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)


def write_images(folder: Path, count: int) -> None:
    """Windows of 500x375, as ImageNet's files mostly are, from photographs; JPEG of quality 90."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    generator = random.Random(0)
    for number in range(count):
        whole = photographs[number % len(photographs)]
        left = generator.randrange(whole.width - 500)
        top = generator.randrange(whole.height - 375)
        path = folder / f"{number % 10}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.crop((left, top, left + 500, top + 375)).save(path, quality=90)


def loader(folder: Path, threads: int, batch: int, augment: bool) -> ImageLoader:
    index = build([folder / "files"], folder / "cache", progress=False)
    return ImageLoader(
        index, seed=0, size=(SIDE, SIDE), micro_batch=batch, rank=0, ranks=1, start=0, period=None,
        augment=Augmentation() if augment else None, threads=threads, device="cpu",
    )  # fmt: skip


def check(folder: Path) -> None:
    """Without augmentation both sides must give the same pixels."""
    ours = loader(folder, 2, 16, augment=False)
    theirs = Folder([])
    batch = next(ours)
    ours.close()
    for image, row in zip(batch["images"], batch["ids"].tolist()):
        with Image.open(ours.index.path(row)) as file:
            other = theirs.finished(file.convert("RGB"), (62, 0, 437, 375), flip=False)
        worst = ((image - other).abs() * torch.tensor(IMAGENET.std)[:, None, None]).max().item()
        if worst > TOLERANCE:
            raise SystemExit(f"no numbers: pixels differ by {worst:.4f}, allowed {TOLERANCE:.4f}")


def batches(side: str, folder: Path, workers: int, batch: int) -> Iterator[Any]:
    if side == "DALI alone":
        loader_module.Pipeline = partial(Pipeline, in_dali=True)  # type: ignore[assignment,misc]
    if side != "DataLoader":
        yield from loader(folder, workers, batch, augment=True)
    paths = sorted((folder / "files").rglob("*.jpg"))
    data = DataLoader(
        Folder(paths), batch, shuffle=True, num_workers=workers, persistent_workers=True,
        drop_last=True, worker_init_fn=lambda worker: torch.set_num_threads(1),
    )  # fmt: skip
    while True:
        yield from data


def contend(side: str, folder: Path, workers: int, batch: int, seconds: float) -> None:
    """One measurement, in a process of its own: prints images a second of steady running."""
    stream = batches(side, folder, workers, batch)
    # The first batches fill the queues; measuring then starts and ends with full ones.
    for _ in range(8 + 3 * workers):
        next(stream)
    count, began, spent = 0, time.perf_counter(), on_cores()
    while time.perf_counter() - began < seconds:
        next(stream)
        count += batch
    print(count / (time.perf_counter() - began), count / (on_cores() - spent), flush=True)
    os._exit(0)  # threads and workers need no farewell


def on_cores() -> float:
    """Seconds that this process and its workers have computed."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def measured(side: str, folder: Path, workers: int, options: argparse.Namespace) -> Rate:
    """Images a second of a contender."""
    words = [sys.executable, __file__, "--contender", side, "--folder", str(folder)]
    words += ["--workers", str(workers), "--batch", str(options.batch)]
    words += ["--seconds", str(options.seconds)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{side} with {workers} workers failed:\n{run.stderr[-3000:]}")
    wall, cores = run.stdout.split()[-2:]
    return Rate(float(wall), float(cores))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All contenders in turn, and the best of each side."""
    contenders = [(side, n) for n in options.workers for side in SIDES]
    rates: dict[tuple[str, int], list[Rate]] = {each: [] for each in contenders}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "files", options.images)
        check(folder)
        for number in range(options.rounds):
            for side, workers in contenders:
                rate = measured(side, folder, workers, options)
                rates[side, workers].append(rate)
                print(
                    f"round {number}: {side}, {workers} workers: {rate.wall:.0f} images/s, "
                    f"{rate.core:.0f} for each second on a core",
                    flush=True,
                )
    medians = {
        each: Rate(*(statistics.median(column) for column in zip(*found)))
        for each, found in rates.items()
    }
    best = {
        side: max((each for each in contenders if each[0] == side), key=medians.__getitem__)
        for side in SIDES
    }
    return {
        "images_per_second": {f"{s}, {n} workers": round(r.wall) for (s, n), r in medians.items()},
        "best_workers": {side: each[1] for side, each in best.items()},
        "ours_over": {
            side: {
                name: spread([a[n] / b[n] for a, b in zip(rates[best["ours"]], rates[best[side]])])
                for n, name in enumerate(("images a second", "images for a second on a core"))
            }
            for side in SIDES[1:]
        },
        "batch": options.batch,
        "rounds": options.rounds,
        "environment": report.environment(),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 2) for name, value in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=int, default=512, metavar="N", help="files to write (default: 512)")
    add("--workers", type=int, nargs="+", default=[1, 2, 3, 4], metavar="N",
        help="processes of the DataLoader, threads of ours (default: 1 2 3 4)")  # fmt: skip
    add("--batch", type=int, default=64, metavar="N", help="images of a batch (default: 64)")
    add("--rounds", type=int, default=5, metavar="N", help="all in turn, as often (default: 5)")
    add("--seconds", type=float, default=6, help="of each measurement (default: 6)")
    add("--contender", choices=SIDES, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        contend(
            options.contender, options.folder, options.workers[0], options.batch, options.seconds
        )
    print(json.dumps(compare(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
