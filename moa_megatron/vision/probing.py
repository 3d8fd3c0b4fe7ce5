"""How much features say about classes: linear probe and nearest neighbours on few labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from moa_megatron.recipes import RefusedError
from moa_megatron.vision.reference import Encoder, Pooling, initialise
from moa_megatron.vision.scaling import Scaling

Features = NDArray[np.float32]
Indices = NDArray[np.int64]
Correct = NDArray[np.bool_]
# Of a draw's number and the labelled training images: their features, and validation's.
Source = Callable[[int, Indices], tuple[Features, Features]]

PROBES = ("linear", "nearest")
_NEIGHBOURS = 5
_PIXEL_SIDE = 32


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval, by Student's t."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ImageSets:
    """Training and validation images [N, 3, h, w] in uint8, and what normalises them."""

    train: Tensor
    valid: Tensor
    scaling: Scaling

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [b, 3, h, w] -> float32, as the encoder was trained on."""
        return self.scaling.apply(pixels.float() / 255)


def of_encoder(encoder: Encoder, images: ImageSets, pooling: Pooling) -> Source:
    """Features of a trained encoder, standardised by the labelled images of each draw."""
    seen, unseen = (
        _features(encoder, images, pixels, pooling, f"features of {split}")
        for split, pixels in (("train", images.train), ("valid", images.valid))
    )
    return lambda draw, indices: standardised(seen[indices], unseen)


def of_untrained(
    encoder: Encoder, images: ImageSets, pooling: Pooling, seed: int, std: float
) -> Source:
    """As ``of_encoder``, of the same encoder with fresh weights, others for each draw."""

    def source(draw: int, indices: Indices) -> tuple[Features, Features]:
        fresh = Encoder(encoder.shape, encoder.moa)
        initialise(fresh, seed + draw, std)
        both = torch.cat([images.train[torch.from_numpy(indices)], images.valid])
        found = _features(fresh, images, both, pooling)
        return standardised(found[: len(indices)], found[len(indices) :])

    return source


def of_pixels(images: ImageSets) -> Source:
    """The images themselves, averaged down to 32 x 32 pixels where they are larger.

    They are all on one scale and stay so: standardised, the pixels of the margin, which hardly
    vary, would count as much as the others, and the baseline would be a weak one.
    """
    height, width = images.valid.shape[2:]
    side = (min(height, _PIXEL_SIDE), min(width, _PIXEL_SIDE))
    seen, unseen = (
        torch.cat(
            [F.adaptive_avg_pool2d(images.normalised(part), side) for part in pixels.split(256)]
        )
        .flatten(1)
        .numpy()
        for pixels in (images.train, images.valid)
    )
    return lambda draw, indices: (seen[indices], unseen)


def _features(
    encoder: Encoder,
    images: ImageSets,
    pixels: Tensor,
    pooling: Pooling,
    description: str | None = None,
) -> Features:
    """Features [N, d], computed on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = encoder.to(device).eval()
    found = []
    with torch.inference_mode():
        bar = None if description else True  # shown on a terminal only
        for part in tqdm(pixels.split(64), desc=description, unit="batch", disable=bar):
            part = images.normalised(part.to(device))
            found.append(encoder.features(part, pooling).float().cpu())
    return torch.cat(found).numpy()


def draw_labelled(
    labels: Indices, classes: list[str], per_class: int | None, draws: int, seed: int
) -> list[Indices]:
    """Random choices of training images whose labels a probe may see.

    Args:
        labels: [N] of the training images.
        classes: their names.
        per_class: images of each class; None: all images, and one draw.
        draws: choices.
        seed: of the choices.

    Raises:
        RefusedError: a class with fewer images.
    """
    if per_class is None:
        return [np.arange(len(labels))]
    members = [np.flatnonzero(labels == label) for label in range(len(classes))]
    scarce = [f"{n} has {len(m)}" for n, m in zip(classes, members) if len(m) < per_class]
    if scarce:
        raise RefusedError(
            f"--labels-per-class {per_class}: more than the training images of {len(scarce)} "
            f"classes ({', '.join(scarce[:3])}); give fewer, or raise --max-images"
        )
    generator = np.random.default_rng(seed)
    return [
        np.concatenate([generator.choice(m, per_class, replace=False) for m in members])
        for _ in range(draws)
    ]


def evaluate(
    sources: dict[str, Source], chosen: list[Indices], labels: Indices, valid_labels: Indices
) -> dict[str, dict[str, Correct]]:
    """Which validation images each probe names rightly.

    Args:
        sources: features by name; all are judged on the same draws.
        chosen: the labelled training images of each draw.
        labels: [N] of all training images.
        valid_labels: [n] of the validation images.

    Returns:
        By source and probe: [draws, n].
    """
    correct: dict[str, dict[str, list[Correct]]] = {
        name: {probe: [] for probe in PROBES} for name in sources
    }
    bar = tqdm(total=len(chosen) * len(sources), desc="probes", unit="fit", disable=None)
    with bar:
        for draw, indices in enumerate(chosen):
            for name, source in sources.items():
                seen, unseen = source(draw, indices)
                predicted = classify(seen, labels[indices], unseen)
                for probe, found in predicted.items():
                    correct[name][probe].append(found == valid_labels)
                bar.update()
    return {
        name: {probe: np.stack(rows) for probe, rows in by_probe.items()}
        for name, by_probe in correct.items()
    }


def standardised(seen: Features, unseen: Features) -> tuple[Features, Features]:
    """Both by mean and deviation of the features with labels."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(seen)
    return scaler.transform(seen), scaler.transform(unseen)


def classify(seen: Features, labels: Indices, unseen: Features) -> dict[str, Indices]:
    """Labels of ``unseen`` by each probe, from features with labels.

    The linear probe is logistic regression, neighbours are those by cosine.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    scarcest = int(np.unique(labels, return_counts=True)[1].min())
    # Of classes with few labels most of several neighbours are others.
    count = _NEIGHBOURS if scarcest >= 2 * _NEIGHBOURS else 1
    probes = {
        "linear": LogisticRegression(max_iter=2000),
        "nearest": KNeighborsClassifier(count, metric="cosine"),
    }
    return {name: probe.fit(seen, labels).predict(unseen) for name, probe in probes.items()}


def accuracy(correct: Correct) -> Interval:
    """Share of right answers [draws, n], see ``_interval``."""
    return _interval(correct.astype(np.float64))


def difference(one: Correct, other: Correct) -> Interval:
    """How much more often one source is right, paired by draw and image, see ``_interval``."""
    return _interval(one.astype(np.float64) - other)


def _interval(values: NDArray[np.float64]) -> Interval:
    """Mean of [draws, n]; what varies are the draws, or the images where there is one draw."""
    from scipy import stats

    sample = values.mean(axis=1) if len(values) > 1 else values[0]
    mean = float(sample.mean())
    error = float(sample.std(ddof=1)) / len(sample) ** 0.5
    half = float(stats.t.ppf(0.975, len(sample) - 1)) * error
    return Interval(mean, mean - half, mean + half)
