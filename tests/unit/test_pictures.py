"""Reconstruction grids: every pixel where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from moa_megatron.vision.patches import normalised_targets, patchify
from moa_megatron.vision.pictures import reconstruction_grid, write_picture
from moa_megatron.vision.scaling import Scaling

PATCH, H, W, GAP = 2, 4, 6, 3
SCALING = Scaling((0.5, 0.4, 0.3), (0.25, 0.5, 0.75))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    return SCALING.apply(pixels / 255)


def test_columns_show_original_mask_and_prediction() -> None:
    pixels = torch.randint(256, (2, 3, H, W), generator=torch.Generator().manual_seed(0))
    other = torch.randint(256, (2, 3, H, W), generator=torch.Generator().manual_seed(1))
    visible = torch.tensor([[0, 4], [5, 1]])
    patches = patchify(normalise(pixels), PATCH)
    _, mean, std = normalised_targets(patches)
    predicted = (patchify(normalise(other), PATCH) - mean) / std
    grid = reconstruction_grid(
        normalise(pixels),
        predicted,
        mean,
        std,
        visible=visible,
        patch=PATCH,
        gap=GAP,
        scaling=SCALING,
    )
    assert grid.shape == (2 * H + GAP, 3 * W + 2 * GAP, 3) and grid.dtype == np.uint8
    # Patch 4 is in row 1, column 1 of the 2 x 3 patches.
    seen = torch.zeros(2, H, W, dtype=torch.bool)
    seen[0, :2, :2] = seen[0, 2:, 2:4] = True
    seen[1, 2:, 4:] = seen[1, :2, 2:4] = True
    for row in range(2):
        top = row * (H + GAP)
        shown = [grid[top : top + H, c * (W + GAP) : c * (W + GAP) + W] for c in range(3)]
        original, wrong = (x[row].permute(1, 2, 0).numpy() for x in (pixels, other))
        mask = seen[row].numpy()[..., None]
        assert np.array_equal(shown[0], original)
        assert np.array_equal(shown[1], np.where(mask, original, 127))
        assert np.array_equal(shown[2], np.where(mask, original, wrong))
    assert (grid[H : H + GAP] == 255).all() and (grid[:, W : W + GAP] == 255).all()


def test_the_file_enlarges_whole_pixels(tmp_path: Path) -> None:
    grid = np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8)
    write_picture(grid, tmp_path / "grid.png", "step 3, loss $0.4")
    with Image.open(tmp_path / "grid.png") as file:
        shown = np.asarray(file.convert("RGB"))
    assert shown.shape[1] == 600 and shown.shape[0] > 300
    assert np.array_equal(shown[-300:][5::10, 5::10], grid)
    assert (shown[:-300] < 128).any()  # the columns' names
