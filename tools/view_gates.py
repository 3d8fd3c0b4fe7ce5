#!/usr/bin/env python3
"""Shows what the gates of a run do: mixing weights and hidden range of every layer over training.

    tools/view_gates.py runs/tiny-moe
    tools/view_gates.py runs/moe-2b --out gates.png

Reads what --moa-log-interval has written to TensorBoard: prints a table of the last step and draws
one panel for each layer's mean gate values (LA: its coefficients), and the largest absolute hidden
value of all layers. docs/telemetry.md explains the numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moa_megatron import telemetry  # noqa: E402
from moa_megatron.runstate import REFUSED  # noqa: E402
from moa_megatron.telemetry import Curve  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 6
_WEIGHTS = ("gate_mean", "coefficient")
# By what a layer, or its shared or routed experts, show: "layer_01", "layer_01/routed".
Shown = dict[str, dict[str, Curve]]


def main(words: Sequence[str] | None = None) -> int:
    """Prints the table and draws the picture; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder, or its TensorBoard folder")
    parser.add_argument("--out", type=Path, help="the picture; default: gates.png in the run")
    options = parser.parse_args(words)
    out = options.out or options.run / "gates.png"
    try:
        shown = read(options.run)
        draw(shown, str(options.run), out)
    except ValueError as error:
        sys.stderr.write(f"refused: {error}\n")
        return REFUSED
    except OSError as error:
        sys.stderr.write(f"refused: {out} cannot be written: {error.strerror}\n")
        return REFUSED
    print(text(shown))
    print(f"\npicture {out}")
    return 0


def read(run: Path) -> Shown:
    """The statistics of each layer, in the order of the model.

    Raises:
        ValueError: where there are none.
    """
    folder = run / "tensorboard"
    curves = telemetry.read_statistics(folder if folder.is_dir() else run)
    shown: Shown = {}
    for tag in sorted(curves):
        _, owner, *rest = tag.split("/")
        if rest and rest[0] in ("shared", "routed"):
            owner = f"{owner}/{rest.pop(0)}"
        if rest:  # else a value of all layers
            shown.setdefault(owner, {})["/".join(rest)] = curves[tag]
    if not shown:
        raise ValueError(
            f"{run} has no statistics of layers: train with --moa-log-interval 10, and with "
            "--moa-mixing moa or la; a run without events of TensorBoard has none either"
        )
    return shown


def weights(statistics: dict[str, Curve]) -> dict[str, Curve]:
    """Mixing weights by coefficient: ``z_silu``."""
    parts = ((name.split("/", 1), curve) for name, curve in statistics.items())
    return {key[1]: curve for key, curve in parts if key[0] in _WEIGHTS}


def text(shown: Shown) -> str:
    """The table: the last value of each, and the largest hidden value of the run."""
    rows = []
    for owner, statistics in shown.items():
        last = {name: curve.values[-1] for name, curve in weights(statistics).items()}
        ranked = [f"{name} {last[name]:.3f}" for name in sorted(last, key=lambda n: -last[n])]
        hidden = statistics.get("hidden_amax")
        rows.append(
            (
                owner,
                ", ".join(ranked[:2]),
                ", ".join(ranked[-2:]) if len(ranked) > 2 else "",
                _last(statistics, "gate_saturated", ".1%"),
                _last(statistics, "gate_entropy", ".3f"),
                _last(statistics, "preact_amax", ".4g"),
                _last(statistics, "hidden_amax", ".4g"),
                "" if hidden is None else f"{max(hidden.values):.4g}",
            )
        )
    header = ("layer", "largest weights", "smallest", "saturated", "entropy")
    return telemetry.table((*header, "preact amax", "hidden amax", "its peak"), rows)


def _last(statistics: dict[str, Curve], name: str, form: str) -> str:
    return format(statistics[name].values[-1], form) if name in statistics else ""


def draw(shown: Shown, title: str, path: Path) -> None:
    """A panel for each layer that shows mixing weights, one for the hidden range of all, a key."""
    gates = {owner: found for owner in shown if (found := weights(shown[owner]))}
    columns = min(_COLUMNS, len(gates) + 2)
    rows = -(-(len(gates) + 2) // columns)
    values = [v for curves in gates.values() for curve in curves.values() for v in curve.values]
    with telemetry.picture(path, columns, rows, (4.2, 3.2)) as axes:
        for one, (owner, curves) in zip(axes, gates.items()):
            plot_weights(one, curves)
            one.set_title(owner)
            if values:
                one.set_ylim(min(values) - 0.02, max(values) + 0.02)  # alike, to be compared
        plot_range(axes[len(gates)], shown)
        key, *rest = axes[len(gates) + 1 :]
        lines, names = axes[0].get_legend_handles_labels() if gates else ([], [])
        key.legend(lines, names, frameon=False, loc="center left", ncols=1 + len(names) // 8)
        for one in (key, *rest):
            one.set_axis_off()
        figure = key.get_figure()
        assert figure is not None
        figure.suptitle(title)


def plot_weights(axes: Axes, curves: dict[str, Curve]) -> None:
    """Weights of one layer: a colour for each activation, dashes for the branch z of two."""
    branches = {name[:2] for name in curves if name[:2] in ("y_", "z_")}
    both = len(branches) == 2
    activations = list(dict.fromkeys(name[2:] if both else name for name in curves))
    for name, curve in curves.items():
        color = f"C{activations.index(name[2:] if both else name)}"
        style = "--" if both and name.startswith("z_") else "-"
        axes.plot(curve.steps, curve.values, style, color=color, lw=1.2, label=name)
    axes.set_xlabel("step")


def plot_range(axes: Axes, shown: Shown) -> None:
    """Hidden amax on a log axis, early layers dark, late ones light; dashes for routed experts."""
    import matplotlib

    row = matplotlib.colormaps["viridis"]
    layers = list(dict.fromkeys(owner.split("/")[0] for owner in shown))
    for owner, statistics in shown.items():
        curve = statistics.get("hidden_amax")
        if curve is None:
            continue
        index = layers.index(owner.split("/")[0])
        few = index in (0, len(layers) - 1)  # the legend names the ends of the scale
        axes.plot(
            curve.steps,
            curve.values,
            "--" if owner.endswith("/routed") else "-",
            color=row(0.9 * index / max(len(layers) - 1, 1)),
            label=owner if few else "",
            lw=1.2,
        )
    axes.set_yscale("log")
    for axis_part in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_part("{x:g}")  # pictures read no formulas, which log axes are labelled with
    axes.set_xlabel("step")
    axes.set_title("hidden amax")
    telemetry.legend(axes)


if __name__ == "__main__":
    sys.exit(main())
