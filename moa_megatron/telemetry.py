"""Curves of a run: read back from TensorBoard, drawn as a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

TRAIN_LOSS, VALID_LOSS = "lm loss", "lm loss validation"


@dataclass
class Curve:
    """Steps and values of one scalar, in order; a resumed run's newer values win."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def read_scalars(folder: Path, tags: tuple[str, ...]) -> dict[str, Curve]:
    """The scalars ``tags`` of a TensorBoard folder; absent ones are left out."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    points: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag in tags:
                    points.setdefault(value.tag, {})[event.step] = value.simple_value
    return {
        tag: Curve(sorted(steps), [steps[step] for step in sorted(steps)])
        for tag, steps in points.items()
    }


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
