"""Curves of runs, read back from TensorBoard and drawn; results of runs as picture and table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN_LOSS, VALID_LOSS = "lm loss", "lm loss validation"
# What models of images call theirs; read under the names above.
_OTHER_LOSS = "mae loss"
NATS = "nats per token"
TEST_LOSS = "lm loss test"  # ours: Megatron logs the test set under the tag of validation
STATISTICS = "moa"  # what tags of layers start with
_LABEL_WIDTH = 40


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
    points = _read(folder, {TRAIN_LOSS, VALID_LOSS}.__contains__)
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
    return {tag: _curve(steps) for tag, steps in _read(folder, set(tags).__contains__).items()}


def read_statistics(folder: Path) -> dict[str, Curve]:
    """All statistics of layers in a TensorBoard folder, by tag."""
    points = _read(folder, lambda tag: tag.startswith(f"{STATISTICS}/"))
    return {tag: _curve(steps) for tag, steps in points.items()}


def coefficient_tag(kind: str, name: str) -> str:
    """The end of a tag for one of ``MoAConfig.coefficient_names``: ``gate_mean/z_silu``.

    Tags are file names to some readers, so no colons and stars.
    """
    return f"{kind}/{name.replace(':', '_').replace('*', '_x_')}"


def _curve(points: dict[int, list[float]]) -> Curve:
    steps = sorted(points)
    return Curve(steps, [points[step][-1] for step in steps])


def _read(folder: Path, wanted: Callable[[str], bool]) -> dict[str, dict[int, list[float]]]:
    """All values by tag and step, in the order they were written."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    points: dict[str, dict[int, list[float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                tag = value.tag
                if tag.startswith(_OTHER_LOSS):
                    tag = tag.replace(_OTHER_LOSS, TRAIN_LOSS, 1)
                if wanted(tag):
                    steps = points.setdefault(tag, {})
                    steps.setdefault(event.step, []).append(value.simple_value)
    return points


def draw_losses(
    runs: dict[str, dict[str, Curve]],
    title: str,
    path: Path,
    tag: str | None = None,
    unit: str = NATS,
) -> None:
    """A picture of ``plot_losses``.

    Args:
        runs: curves by run name, as ``read_scalars`` returns them.
        title: above the picture.
        path: the PNG to write.
        tag: draw this scalar only; default: training and validation loss.
        unit: of the loss.
    """
    with picture(path) as (axes,):
        plot_losses(axes, runs, tag, unit=unit)
        axes.set_title(title)


def plot_losses(
    axes: Axes,
    runs: dict[str, dict[str, Curve]],
    tag: str | None = None,
    in_order: bool = False,
    unit: str = NATS,
) -> None:
    """Loss against step of one or several runs, training as lines, validation as dots.

    Args:
        axes: of matplotlib.
        runs: curves by run name.
        tag: draw this scalar only.
        in_order: the runs are a row, such as of rising learning rates: so are their colours.
        unit: of the loss.
    """
    import matplotlib

    row = matplotlib.colormaps["viridis"]
    for index, (name, curves) in enumerate(runs.items()):
        color: Any = row(0.9 * index / max(len(runs) - 1, 1)) if in_order else f"C{index}"
        unnamed = True
        for which, style, width in ((TRAIN_LOSS, "-", 1.0), (VALID_LOSS, "o--", 1.6)):
            if which not in curves or tag not in (None, which):
                continue
            kind = "training" if which == TRAIN_LOSS else "validation"
            # Of several runs each is named once: the legend would be twice as long.
            label = kind if len(runs) == 1 and tag is None else (_label(name) if unnamed else "")
            unnamed = False
            curve = curves[which]
            axes.plot(
                curve.steps,
                curve.values,
                style,
                color=color,
                label=label,
                lw=width,
                markersize=3,
            )
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss ({unit})")
    legend(axes)


def plot_results(
    axes: Axes,
    lines: dict[str, list[tuple[float, float | None]]],
    ticks: dict[float, str],
) -> None:
    """Final loss against a setting that is a number, on a log axis where that is positive.

    Args:
        axes: of matplotlib.
        lines: pairs of setting and loss by line name; None for a run without a result.
        ticks: the settings as the user wrote them.
    """
    if min(ticks) > 0:
        axes.set_xscale("log")
    missed = []
    for name, pairs in lines.items():
        found = sorted((x, y) for x, y in pairs if y is not None)
        axes.plot([x for x, _ in found], [y for _, y in found], "o-", label=_label(name))
        missed += [x for x, y in pairs if y is None]
    if missed:
        # At the top edge: a run without a result has no height of its own.
        edge = axes.get_xaxis_transform()
        axes.plot(missed, [0.97] * len(missed), "rx", transform=edge, label="no result")
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=45 if len(ticks) > 6 else 0)
    axes.minorticks_off()
    legend(axes)


def plot_bars(axes: Axes, results: dict[str, float | str]) -> None:
    """Final loss of runs by name, the first on top; a text where there is no loss."""
    best = min((loss for loss in results.values() if isinstance(loss, float)), default=None)
    size = min(10.0, 150 / len(results))  # in points: names must not cover each other
    for row, result in enumerate(results.values()):
        if isinstance(result, float):
            axes.barh(row, result, color="C1" if result == best else "C0")
            axes.text(result, row, f" {result:.4f}", va="center", fontsize=size)
        else:
            axes.text(0.0, row, f" {result}", va="center", color="red", fontsize=size)
    axes.set_yticks(range(len(results)), [_label(name) for name in results], fontsize=size)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.margins(x=0.2)  # for the numbers at the bars' ends


def legend(axes: Axes) -> None:
    """Names what is drawn, in smaller print where it is much; nothing where it has no names."""
    names = axes.get_legend_handles_labels()[1]
    if names:
        size = "medium" if len(names) <= 8 else "x-small"
        axes.legend(frameon=False, fontsize=size, ncols=1 + len(names) // 16)


@contextlib.contextmanager
def picture(
    path: Path, columns: int = 1, rows: int = 1, size: tuple[float, float] = (7, 4.2)
) -> Iterator[list[Axes]]:
    """Empty axes, row by row, each of ``size`` inches; written to ``path`` on leaving."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Names are the user's, and no formulas: a lone $ in one must not end the drawing.
    with plt.rc_context({"text.parse_math": False}):
        whole = (size[0] * columns, size[1] * rows)
        figure, grid = plt.subplots(rows, columns, figsize=whole, dpi=130, squeeze=False)
        axes = list(grid.flat)
        for one in axes:
            one.grid(alpha=0.3)
        try:
            yield axes
            figure.tight_layout()
            figure.savefig(path)
        finally:
            plt.close(figure)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    cells = [
        [" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (header, *rows)
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _label(name: str) -> str:
    """A name that a picture has room for, led by no underscore, which matplotlib hides."""
    name = " ".join(name.split())
    short = name if len(name) <= _LABEL_WIDTH else f"{name[: _LABEL_WIDTH - 3]}..."
    return f" {short}" if short.startswith("_") else short
