"""Batches: order, resume, ranks, windows, pixels against Pillow, failures in the middle."""

import io
import math
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from moa_megatron.vision.images.augment import (
    Augmentation,
    centre_windows,
    crop_windows,
    flips,
)
from moa_megatron.vision.images.building import build
from moa_megatron.vision.images.index import ImageIndex, save
from moa_megatron.vision.images.loader import Batch, ImageLoader, ImagesChangedError
from moa_megatron.vision.images.order import image_ids
from moa_megatron.vision.images.pipeline import Encoded, Pipeline
from moa_megatron.vision.scaling import IMAGENET
from tests.helpers import images

ROOT = Path(__file__).parents[2]
COUNT = 11
# Of a value in 0 to 255: both resizers keep 8 bits between their two passes, and round differently.
TOLERANCE = 1.001


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    folder = tmp_path_factory.mktemp("images")
    return made(images.write_tree(folder / "data", images.good(COUNT)))


def made(source: Path, **options: Any) -> ImageIndex:
    return build([source], source.parent / "cache", workers=1, progress=False, **options)


def loader(index: ImageIndex, **options: Any) -> ImageLoader:
    settings: dict[str, Any] = {
        "seed": 5, "size": (32, 32), "micro_batch": 4, "rank": 0, "ranks": 1, "start": 0,
        "period": None, "augment": Augmentation(), "threads": 2, "device": "cpu",
    }  # fmt: skip
    return ImageLoader(index, **settings | options)


def taken(index: ImageIndex, count: int, **options: Any) -> list[Batch]:
    stream = loader(index, **options)
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return batches


def joined(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys() == {"images", "ids", "samples", "labels"}
    for name in one:
        assert torch.equal(one[name], other[name]), name


def pixels(batch: torch.Tensor) -> NDArray[np.float32]:
    """[b, h, w, 3] in 0 to 255."""
    values = IMAGENET.undo(batch)
    return np.asarray(255 * values.permute(0, 2, 3, 1).numpy())


def test_order_is_a_permutation_each_epoch() -> None:
    ids = image_ids(3, np.arange(3 * COUNT), COUNT).reshape(3, COUNT)
    assert (np.sort(ids) == np.arange(COUNT)).all()
    assert len({tuple(epoch) for epoch in ids}) == 3
    assert not np.array_equal(ids[0], image_ids(4, np.arange(COUNT), COUNT))
    # In any order, across the turn of an epoch, far from the start.
    assert image_ids(3, [2 * COUNT, 0, COUNT - 1], COUNT).tolist() == [
        ids[2, 0], ids[0, 0], ids[0, -1],
    ]  # fmt: skip
    assert image_ids(3, 10**12, COUNT) in np.arange(COUNT)


def test_a_loader_started_later_gives_the_same(index: ImageIndex) -> None:
    through = taken(index, 7)  # more than two epochs
    for k in (1, 4):
        later = taken(index, 2, start=4 * k)
        for one, other in zip(through[k:], later):
            assert_same(one, other)
    assert sorted(joined(through)["ids"][:COUNT].tolist()) == list(range(COUNT))
    assert joined(through)["samples"].tolist() == list(range(28))
    labels = torch.from_numpy(index.label)
    assert torch.equal(joined(through)["labels"], labels[joined(through)["ids"]])
    assert joined(through)["images"].shape == (28, 3, 32, 32)
    # The same image, shown again in another epoch, is cut otherwise.
    ids = joined(through)["ids"]
    first, second = (ids == ids[0]).nonzero().flatten()[:2]
    assert not torch.equal(joined(through)["images"][first], joined(through)["images"][second])


def test_ranks_share_what_one_has(index: ImageIndex) -> None:
    whole = joined(taken(index, 6, micro_batch=2, start=6))
    halves = [taken(index, 3, micro_batch=2, start=6, rank=r, ranks=2) for r in (0, 1)]
    assert_same(whole, joined([batch for pair in zip(*halves) for batch in pair]))
    wide = joined(taken(index, 3, micro_batch=4, start=6))
    assert_same(whole, wide)


def test_seed_and_threads(index: ImageIndex) -> None:
    one = taken(index, 2)
    assert_same(joined(one), joined(taken(index, 2, threads=5)))
    assert not torch.equal(one[0]["images"], taken(index, 1, seed=6)[0]["images"])


def test_every_evaluation_sees_the_same(index: ImageIndex) -> None:
    stream = taken(index, 4, period=8, augment=None)
    assert_same(joined(stream[:2]), joined(stream[2:]))
    assert_same(stream[1], taken(index, 1, period=8, augment=None, start=12)[0])
    assert joined(stream)["samples"].tolist() == [*range(8)] * 2


def test_nothing_happens_before_the_first_batch(index: ImageIndex) -> None:
    before = threading.active_count()
    stream = loader(index)
    assert threading.active_count() == before
    assert (stream.waited, stream.batches) == (0, 0)
    next(stream)
    assert stream.waited > 0 and stream.batches == 1
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(stream)
    loader(index).close()


def test_a_loader_that_is_not_closed_ends_quietly(index: ImageIndex, tmp_path: Path) -> None:
    save(index, tmp_path / "index.npz")
    script = """
import sys
from pathlib import Path
from moa_megatron.vision.images.index import load
from tests.unit.test_images_loader import loader
stream = loader(load(Path(sys.argv[1])))
next(stream)
"""
    words = [sys.executable, "-c", script, str(tmp_path / "index.npz")]
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert (run.returncode, run.stderr) == (0, "")


def scalar_window(
    generator: random.Random, height: int, width: int, augment: Augmentation
) -> tuple[int, int, int, int]:
    """The rule, one image at a time."""
    for _ in range(10):
        area = height * width * generator.uniform(*augment.scale)
        ratio = math.exp(generator.uniform(*(math.log(r) for r in augment.ratio)))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            top, left = generator.randint(0, height - tall), generator.randint(0, width - wide)
            return top, left, tall, wide
    wide = min(width, round(height * augment.ratio[1]))
    tall = min(height, round(width / augment.ratio[0]))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def statistics(windows: NDArray[np.integer[Any]]) -> list[NDArray[Any]]:
    tall, wide = windows[:, 2], windows[:, 3]
    return [*windows.T, tall * wide, wide / tall]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (300, 90), (7, 5)])
def test_windows_follow_the_rule(height: int, width: int) -> None:
    number, augment = 12_000, Augmentation()
    sides = np.full(number, height), np.full(number, width)
    found = crop_windows(1, np.arange(number), *sides, augment.scale, augment.ratio)
    assert found.dtype == np.int32 and (found >= [0, 0, 1, 1]).all()
    assert (found[:, :2] + found[:, 2:] <= [height, width]).all()
    generator = random.Random(0)
    expected = np.array([scalar_window(generator, height, width, augment) for _ in range(number)])
    for one, other in zip(statistics(found), statistics(expected)):
        # Two-sample Kolmogorov-Smirnov; the bound is passed by chance once in 10^5.
        grid = np.union1d(one, other)
        gap = np.searchsorted(np.sort(one), grid, "right") - np.searchsorted(
            np.sort(other), grid, "right"
        )
        assert np.abs(gap).max() / number < 2.47 * math.sqrt(2 / number)


def test_windows_that_never_fit_are_centred() -> None:
    augment = Augmentation()
    found = crop_windows(1, range(3), [10, 400, 10], [400, 10, 10], (0.9, 1.0), augment.ratio)
    assert found[0].tolist() == [0, 193, 10, 13] and found[1].tolist() == [193, 0, 13, 10]
    assert found[2, 2] >= 8


def test_flips_and_windows_are_independent() -> None:
    samples = np.arange(4000)
    found = flips(1, samples, 0.5)
    assert abs(found.mean() - 0.5) < 0.04
    assert not flips(1, samples, 0.0).any() and flips(1, samples, 1.0).all()
    sides = np.full(4000, 100)
    windows = crop_windows(1, samples, sides, sides, (0.2, 1.0), (3 / 4, 4 / 3))
    correlation = np.corrcoef(np.vstack([found, windows.T]))
    assert np.abs(correlation[0, 1:]).max() < 0.07


def test_centre_windows() -> None:
    assert centre_windows([375, 100], [500, 100], 1.0).tolist() == [
        [0, 62, 375, 375], [0, 0, 100, 100],
    ]  # fmt: skip
    assert centre_windows([256], [512], 1.0, 224 / 256).tolist() == [[16, 144, 224, 224]]
    assert centre_windows([100], [100], 2.0).tolist() == [[25, 0, 50, 100]]
    assert centre_windows([1], [1], 1.0, 0.1).tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("in_dali", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("size", [(32, 32), (80, 56)])
def test_pixels_equal_pillows(kind: str, size: tuple[int, int], in_dali: bool) -> None:
    """The window is in the image as displayed, whatever its EXIF orientation says.

    What DALI does on a GPU is held to the same here, on its CPU operators.
    """
    generator = np.random.default_rng(0)
    files, windows, expected = [], [], []
    for orientation in range(1, 9 if kind != "BMP" else 2):
        options = {"exif": images.turned(orientation)} if kind != "BMP" else {}
        for mode in ("RGB", "L") if kind != "WEBP" else ("RGB",):
            image = images.photograph(orientation, 120, 90).convert(mode)
            file = images.encode(image, kind, **options)
            shown = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
            tall, wide = generator.integers(20, 80, 2)
            top = generator.integers(shown.height - tall + 1)
            left = generator.integers(shown.width - wide + 1)
            shown = shown.crop((left, top, left + wide, top + tall))
            shown = shown.resize(size[::-1], Image.Resampling.BILINEAR)
            expected.append(np.asarray(ImageOps.mirror(shown) if len(files) % 2 else shown))
            windows.append((top, left, tall, wide))
            files.append(np.frombuffer(file, dtype=np.uint8))
    mirrored = np.arange(len(files)) % 2 == 1
    encoded = Encoded(files, np.array(windows, dtype=np.int32), mirrored)
    pipeline = Pipeline(lambda: encoded, size, len(files), 2, "cpu", IMAGENET, in_dali)
    got = pixels(pipeline.next())
    pipeline.close()
    off = np.abs(got - np.array(expected))
    if in_dali:  # at the border DALI repeats the last pixel where Pillow weighs the others more
        assert off.max() < 20
        off = off[:, 1:-1, 1:-1]
    print(f"{kind} {size} {in_dali}: at most {off.max():.2f}, {(off < 0.01).mean():.3f} equal")
    assert off.max() <= TOLERANCE
    # Most are equal: of a slightly wrong window none would be.
    assert (off < 0.01).mean() > 0.8


@pytest.mark.parametrize("augment", [Augmentation(), Augmentation((0.5, 0.6), (1, 2), 1.0), None])
def test_batches_hold_what_order_and_windows_say(
    index: ImageIndex, augment: Augmentation | None
) -> None:
    batch = joined(taken(index, 6, start=5, augment=augment, crop_fraction=0.8))
    samples = np.arange(5, 29)
    ids = image_ids(5, samples, COUNT)
    assert batch["ids"].tolist() == ids.tolist()
    sides = index.height[ids], index.width[ids]
    windows, mirrored = centre_windows(*sides, 1.0, 0.8), np.zeros(24, dtype=bool)
    if augment is not None:
        windows = crop_windows(5, samples, *sides, augment.scale, augment.ratio)
        mirrored = flips(5, samples, augment.flip)
    for got, row, window, mirror in zip(pixels(batch["images"]), ids, windows, mirrored):
        top, left, tall, wide = window.tolist()
        shown = Image.open(index.path(row)).crop((left, top, left + wide, top + tall))
        shown = shown.resize((32, 32), Image.Resampling.BILINEAR)
        expected = np.asarray(ImageOps.mirror(shown) if mirror else shown)
        assert np.abs(got - expected).max() <= TOLERANCE


def test_batches_own_their_memory(index: ImageIndex) -> None:
    stream = loader(index)
    first = next(stream)["images"]
    kept = first.clone()
    for _ in range(6):
        next(stream)
    stream.close()
    assert torch.equal(first, kept)


@pytest.mark.parametrize("damage", ["deleted", "shortened", "overwritten"])
def test_files_that_change_are_named(tmp_path: Path, damage: str) -> None:
    index = made(images.write_tree(tmp_path / "data", images.good(120)))
    stream = loader(index)
    next(stream)
    row = int(image_ids(5, 110, 120)[0])  # far beyond what is read ahead
    path = Path(index.path(row))
    whole = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    elif damage == "shortened":
        path.write_bytes(whole[:-1])
    else:
        path.write_bytes(bytes(len(whole)))
    with pytest.raises(ImagesChangedError) as failed:
        for _ in range(40):
            next(stream)
    message = str(failed.value)
    reason = {
        "deleted": "No such file",
        "shortened": f"{len(whole) - 1:,} bytes long",
        "overwritten": "no image",
    }
    assert f"{path}: {reason[damage]}" in message
    assert message.count(".jpg") == 1
    assert all(thread.name != "images" for thread in threading.enumerate())


def test_shards_give_the_same_batches(tmp_path: Path) -> None:
    files = dict(sorted(images.good(9).items()))
    tree = made(images.write_tree(tmp_path / "tree", files))
    tar = made(images.write_tar(tmp_path / "train.tar", files))
    records = made(images.write_records(tmp_path / "train.tfrecord", files))
    batches = [joined(taken(index, 3)) for index in (tree, tar, records)]
    assert_same(batches[0], batches[1])
    assert_same(batches[0], batches[2])
