"""Probes find what is there, and nothing where nothing is; images and runs are read as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from moa_megatron.config import MoAConfig
from moa_megatron.recipes import RefusedError
from moa_megatron.vision.reference import MAE
from moa_megatron.vision.scaling import Scaling
from tests.helpers.mae_checkpoint import namespace, write_run
from tests.helpers.plain_mae import SHAPE, megatron_state
from tools import probe

pytest.importorskip("nvidia.dali", reason="needs the extra vision")
from moa_megatron.vision import probing  # noqa: E402
from moa_megatron.vision.labelled import read_labelled  # noqa: E402

CLASSES = ["ant", "bee", "cat"]


def planted(signal: float, seed: int) -> probing.Source:
    """Features of 90 training and 120 validation images: noise, and their class times `signal`."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(3, 16))
    seen, unseen = (
        (signal * centres[np.arange(n) % 3] + generator.normal(size=(n, 16))).astype(np.float32)
        for n in (90, 120)
    )
    return lambda draw, indices: probing.standardised(seen[indices], unseen)


def judged(**sources: probing.Source) -> dict[str, dict[str, probing.Correct]]:
    labels, valid = np.arange(90) % 3, np.arange(120) % 3
    chosen = probing.draw_labelled(labels, CLASSES, 5, 10, seed=0)
    return probing.evaluate(sources, chosen, labels, valid)


@pytest.mark.parametrize("kind", probing.PROBES)
def test_a_planted_signal_is_found_and_noise_is_not(kind: str) -> None:
    found = judged(signal=planted(1.5, 0), noise=planted(0.0, 1), other=planted(0.0, 2))
    assert probing.accuracy(found["signal"][kind]).low > 0.8
    chance = probing.accuracy(found["noise"][kind])
    assert chance.low < 1 / 3 < chance.high
    gain = probing.difference(found["signal"][kind], found["noise"][kind])
    assert gain.low > 0.4
    none = probing.difference(found["noise"][kind], found["other"][kind])
    assert none.low < 0 < none.high


def test_intervals_by_hand() -> None:
    correct = np.zeros((4, 10), dtype=bool)
    for draw, right in enumerate((2, 4, 6, 8)):
        correct[draw, :right] = True
    found = probing.accuracy(correct)
    # Mean 0.5, deviation 0.2582, t of 3 degrees of freedom 3.1824.
    assert found.mean == pytest.approx(0.5)
    assert found.high - found.mean == pytest.approx(3.1824 * 0.258199 / 2, rel=1e-4)
    # Paired: one right answer more in each draw has no variance at all.
    better = correct.copy()
    better[:, 9] = True
    gain = probing.difference(better, correct)
    assert (gain.low, gain.mean, gain.high) == pytest.approx((0.1, 0.1, 0.1))
    # One draw: the images vary, 5 of 10 right.
    single = probing.accuracy(better[1:2])
    assert single.high - single.mean == pytest.approx(2.2622 * 0.527046 / 10**0.5, rel=1e-4)


def test_draws_are_balanced_differ_and_repeat() -> None:
    labels = np.repeat([0, 1, 2], [7, 20, 30])
    draws = probing.draw_labelled(labels, CLASSES, 7, 5, seed=3)
    for indices in draws:
        assert np.bincount(labels[indices]).tolist() == [7, 7, 7]
        assert len(set(indices.tolist())) == 21
    assert len({tuple(sorted(indices.tolist())) for indices in draws}) == 5
    again = probing.draw_labelled(labels, CLASSES, 7, 5, seed=3)
    assert all(np.array_equal(one, other) for one, other in zip(draws, again))
    assert probing.draw_labelled(labels, CLASSES, None, 5, seed=3)[0].tolist() == list(range(57))
    with pytest.raises(RefusedError, match="1 classes \\(ant has 7\\)"):
        probing.draw_labelled(labels, CLASSES, 8, 5, seed=3)


def write_images(folder: Path, names: list[str], count: int, seed: int) -> Path:
    """Noise with more of one colour; which one is the class."""
    generator = np.random.default_rng(seed)
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels: NDArray[np.int64] = generator.integers(0, 120, (*SHAPE.image, 3))
            pixels[..., label % 3] += 120
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(folder / name / f"{index}.png")
    return folder


def test_each_image_is_read_once_with_its_class(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "train", CLASSES, 30, seed=0)
    (folder / "bee" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    found = read_labelled([folder], tmp_path / "cache", SHAPE.image, max_bad_fraction=0.1)
    assert found.classes == CLASSES and found.pixels.dtype == torch.uint8
    assert len(found.labels) == len(found.pixels) == 90  # more than a batch
    files = sorted(folder.glob("*/*.png"))
    written = {np.asarray(Image.open(f)).tobytes(): CLASSES.index(f.parent.name) for f in files}
    shown = [image.permute(1, 2, 0).numpy().tobytes() for image in found.pixels]
    assert len(set(shown)) == 90
    assert [written[image] for image in shown] == found.labels.tolist()
    some = read_labelled([folder], tmp_path / "cache", SHAPE.image, limit=70, max_bad_fraction=0.1)
    assert len(some.labels) == 70 and torch.equal(some.pixels, found.pixels[:70])


def test_images_without_classes_are_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "train", ["ant"], 3, seed=0)
    with pytest.raises(RefusedError, match="several classes"):
        read_labelled([folder], tmp_path / "cache", SHAPE.image)


def test_an_encoder_gets_its_pixels_normalised_as_in_training() -> None:
    pixels = torch.randint(256, (4, 3, *SHAPE.image), dtype=torch.uint8)
    scaling = Scaling((0.5, 0.4, 0.3), (0.25, 0.5, 0.75))
    encoder = MAE(SHAPE, MoAConfig()).encoder
    images = probing.ImageSets(pixels, pixels[:2], scaling)
    source = probing.of_encoder(encoder, images, "class")
    seen, _ = source(0, np.arange(4))
    expected = encoder.features(scaling.apply(pixels / 255), "class").detach().numpy()
    np.testing.assert_allclose(seen, probing.standardised(expected, expected)[0], atol=1e-4)
    raw, _ = probing.of_pixels(images)(0, np.array([3, 1]))
    np.testing.assert_allclose(raw, scaling.apply(pixels / 255)[[3, 1]].flatten(1), rtol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train = write_images(folder / "train", CLASSES, 20, seed=1)
    valid = write_images(folder / "valid", CLASSES, 15, seed=2)
    paths = {"train_data_path": [str(train)], "valid_data_path": [str(valid)]}
    others = {**paths, "moa_cache_dir": str(folder / "cache")}
    moa = MoAConfig(variant="qd")
    return write_run(folder / "run", megatron_state(SHAPE, moa), namespace(SHAPE, moa, **others))


def test_the_tool_needs_the_run_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = [run / name for name in ("probe.json", "probe.png")]
    assert probe.main([str(run), "--json", str(written[0]), "--picture", str(written[1])]) == 0
    printed = capsys.readouterr().out
    record = json.loads(written[0].read_text())
    assert record["draws"] == 10 and record["labels_per_class"] == 5 and record["classes"] == 3
    # Colours are in the pixels for everybody to see.
    pixels = record["accuracy"]["pixels"]["linear"]
    assert pixels["mean"] > 0.95
    assert f"| {100 * pixels['mean']:.1f} ± " in printed and "5 labels per class of 3" in printed
    assert set(record["difference"]) == {"untrained encoder", "pixels"}
    assert written[1].read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("pooling", ["moments", "mean", "class"])
def test_all_labels_are_one_draw(
    run: Path, capsys: pytest.CaptureFixture[str], pooling: str
) -> None:
    assert probe.main([str(run), "--labels-per-class", "all", "--features", pooling]) == 0
    printed = capsys.readouterr().out
    assert "all labels per class" in printed and "over images" in printed and pooling in printed


def test_classes_are_matched_by_name(run: Path, tmp_path: Path) -> None:
    valid = write_images(tmp_path / "valid", CLASSES, 10, seed=3)
    (valid / "ant").rename(tmp_path / "gone")  # "bee" is the first class of this folder
    record_file = tmp_path / "record.json"
    words = [str(run), "--valid-data-path", str(valid), "--json", str(record_file)]
    assert probe.main(words) == 0
    record = json.loads(record_file.read_text())
    assert record["valid_images"] == 20 and record["accuracy"]["pixels"]["linear"]["mean"] > 0.95


def test_bad_requests_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = write_images(tmp_path / "strange", ["ant", "dog"], 2, seed=4)
    cases = {
        ("--labels-per-class", "0", "--draws", "0", "--seed", "-1"): "--labels-per-class 0",
        ("--labels-per-class", "all", "--draws", "3"): "nothing to draw",
        ("--labels-per-class", "21"): "ant has 20",
        ("--valid-data-path", str(strange)): "training lacks: dog",
        ("--train-data-path", str(tmp_path / "absent")): "absent",
        ("--step", "9"): "has 7",
        ("--picture", str(tmp_path / "a.xyz")): "--picture",
        ("--json", str(tmp_path / "no" / "a.json")): "cannot be written",
        ("--drawings", "3"): "--drawings",
    }
    for words, message in cases.items():
        assert probe.main([str(run), *words]) == 78, words
        printed = capsys.readouterr().err
        assert "refused: " in printed and message in printed, printed
    assert probe.main([str(run), "--labels-per-class", "x", "--max-images", "0"]) == 78
    assert capsys.readouterr().err.count("\n") == 2  # both mistakes at once
