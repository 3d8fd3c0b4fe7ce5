"""Curves of a run: read back from TensorBoard, drawn as a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

TRAIN_LOSS, VALID_LOSS = "lm loss", "lm loss validation"
TEST_LOSS = "lm loss test"  # ours: Megatron logs the test set under the tag of validation


@dataclass
class Curve:
    """Steps and values of one scalar, in order; a resumed run's newer values win."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def read_run(folder: Path, tested: bool) -> dict[str, Curve]:
    """Training, validation and test loss of a run.

    Args:
        folder: of TensorBoard.
        tested: whether a test set was evaluated: Megatron then writes it last, as validation.
    """
    points = _read(folder, (TRAIN_LOSS, VALID_LOSS))
    curves = {tag: _curve(steps) for tag, steps in points.items()}
    validation = points.get(VALID_LOSS)
    if tested and validation:
        last = max(validation)
        *others, test = validation[last]
        curves[TEST_LOSS] = Curve([last], [test])
        kept = {**validation, last: others} if others else dict(validation)
        if not others:
            del kept[last]
        curves[VALID_LOSS] = _curve(kept)
        if not curves[VALID_LOSS].steps:
            del curves[VALID_LOSS]
    return curves


def read_scalars(folder: Path, tags: tuple[str, ...]) -> dict[str, Curve]:
    """The scalars ``tags`` of a TensorBoard folder; absent ones are left out."""
    return {tag: _curve(steps) for tag, steps in _read(folder, tags).items()}


def _curve(points: dict[int, list[float]]) -> Curve:
    steps = sorted(points)
    return Curve(steps, [points[step][-1] for step in steps])


def _read(folder: Path, tags: tuple[str, ...]) -> dict[str, dict[int, list[float]]]:
    """All values by tag and step, in the order they were written."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    points: dict[str, dict[int, list[float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag in tags:
                    steps = points.setdefault(value.tag, {})
                    steps.setdefault(event.step, []).append(value.simple_value)
    return points


def draw_losses(
    runs: dict[str, dict[str, Curve]], title: str, path: Path, tag: str | None = None
) -> None:
    """Loss against step of one or several runs.

    Args:
        runs: curves by run name, as ``read_scalars`` returns them.
        title: above the picture.
        path: the PNG to write.
        tag: draw this scalar only; default: training and validation loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=130)
    for index, (name, curves) in enumerate(runs.items()):
        color = f"C{index}"
        for which, style in ((TRAIN_LOSS, "-"), (VALID_LOSS, "o--")):
            if which not in curves or tag not in (None, which):
                continue
            label = name if tag else f"{name} {'training' if which == TRAIN_LOSS else 'validation'}"
            curve = curves[which]
            width = 1.0 if which == TRAIN_LOSS else 1.6
            axes.plot(
                curve.steps, curve.values, style, color=color, label=label, lw=width, markersize=3
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
