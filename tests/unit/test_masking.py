"""Which patches are hidden: uniform, reproducible, and a function of the position in the run."""

import numpy as np
import pytest

from moa_megatron.vision.masking import visible_count, visible_patches
from moa_megatron.vision.randomness import Purpose, uniforms

PATCHES, RATIO = 49, 0.75


def test_counts() -> None:
    assert visible_count(196, 0.75) == 49
    assert visible_count(49, 0.75) == 12


def test_each_sample_sees_distinct_patches_in_order() -> None:
    visible = visible_patches(1, np.arange(100), PATCHES, RATIO)
    assert visible.shape == (100, 12)
    assert (visible.diff(dim=1) > 0).all()
    assert visible.min() >= 0 and visible.max() < PATCHES


def test_every_patch_and_every_pair_is_visible_equally_often() -> None:
    count = 20_000
    visible = visible_patches(3, np.arange(count), PATCHES, RATIO).numpy()
    chosen = np.zeros((count, PATCHES))
    np.put_along_axis(chosen, visible, 1.0, axis=1)
    share = 12 / PATCHES
    deviation = (chosen.mean(0) - share) / np.sqrt(share * (1 - share) / count)
    assert np.abs(deviation).max() < 4.5
    pairs = chosen.T @ chosen / count
    expected = share * 11 / 48
    off = ~np.eye(PATCHES, dtype=bool)
    deviation = (pairs[off] - expected) / np.sqrt(expected * (1 - expected) / count)
    assert np.abs(deviation).max() < 5.5


def test_masks_do_not_depend_on_the_batch_they_come_in() -> None:
    whole = visible_patches(1, np.arange(8), PATCHES, RATIO)
    parts = [visible_patches(1, [sample], PATCHES, RATIO)[0] for sample in range(8)]
    assert all((row == part).all() for row, part in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"samples": [1]}, {"purpose": Purpose.AUGMENTATION}]
)
def test_streams_differ(change: dict[str, object]) -> None:
    same: dict[str, object] = {"seed": 1, "purpose": Purpose.MASK, "samples": [0], "count": 64}
    first, other = uniforms(**same), uniforms(**{**same, **change})  # type: ignore[arg-type]
    assert not np.isin(first, other).any()
    assert abs(np.corrcoef(first[0], other[0])[0, 1]) < 0.5


def test_numbers_stay_what_they_are() -> None:
    """A resumed run may meet another version of numpy."""
    found = uniforms(1234, Purpose.MASK, [5], 2)[0]
    assert found.tolist() == pytest.approx([0.22049864637595218, 0.8994764942488995], abs=1e-15)
