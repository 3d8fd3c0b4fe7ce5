#!/usr/bin/env python3
"""Asks what a masked autoencoder has learnt: classes of images from its features and few labels.

    tools/probe.py runs/tiny-mae
    tools/probe.py runs/mae-vit-b --train-data-path imagenet/train --valid-data-path imagenet/val \\
        --max-images 20000 --labels-per-class 10 --picture probe.png

A linear probe and nearest neighbours see the labels of a few training images, drawn at random, and
are tested on the validation images. They are judged against the same encoder with fresh weights
and against the pixels themselves. Images are those that the run was trained on, which need classes,
unless others are named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moa_megatron import packages, telemetry  # noqa: E402
from moa_megatron.recipes import Parser, RefusedError  # noqa: E402
from moa_megatron.runstate import REFUSED, STORAGE, is_storage_error  # noqa: E402

if TYPE_CHECKING:
    from moa_megatron.vision.export import Pretrained
    from moa_megatron.vision.labelled import LabelledImages

_FEATURES = {
    "moments": "mean and deviation of patch tokens",
    "mean": "mean of patch tokens",
    "class": "class token",
}
TRAINED, UNTRAINED, PIXELS = "encoder", "untrained encoder", "pixels"


def main(words: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    try:
        options = parse(words)
        record = probe(options)
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if options.picture is not None:
            draw(record, options.picture)
    except RefusedError as error:
        sys.stderr.write(f"refused: {error}\n")
        return REFUSED
    except OSError as error:
        sys.stderr.write(f"refused: {error.filename} cannot be written: {error.strerror}\n")
        return STORAGE if is_storage_error(error) else REFUSED
    print(text(record))
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; `labels_per_class` is None for all."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="a run's folder, or its folder of checkpoints")
    add("--step", type=int, help="which checkpoint (default: the newest)")
    add("--labels-per-class", default="5", metavar="N", help="a number, or all (default: 5)")
    add("--draws", type=int, help="random choices of the labelled images (default: 10)")
    add("--features", choices=("moments", "mean", "class"), default="moments", help="mean and "
        "standard deviation of the patch tokens, their mean alone, or the class token (default: "
        "moments)")  # fmt: skip
    for split in ("train", "valid"):
        add(f"--{split}-data-path", type=Path, nargs="+", metavar="DIR",
            help="folders of classes, .tar or TFRecord files (default: the run's)")  # fmt: skip
    add("--max-images", type=int, default=5000, metavar="N", help="read at most so many of either "
        "set, drawn at random (default: 5000)")  # fmt: skip
    add("--seed", type=int, default=0, help="of draws and untrained encoders (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write the numbers")
    add("--picture", type=Path, metavar="FILE", help="draw them, as .png or .pdf")
    options = parser.parse_args(words)
    problems = []
    if options.labels_per_class == "all":
        options.labels_per_class = None
        if options.draws is not None:
            problems.append(f"--draws {options.draws}: with all labels there is nothing to draw")
    elif not options.labels_per_class.isdigit() or int(options.labels_per_class) < 1:
        problems.append(f"--labels-per-class {options.labels_per_class}: give a number or all")
    else:
        options.labels_per_class = int(options.labels_per_class)
    options.draws = 10 if options.draws is None else options.draws
    for name in ("draws", "max_images"):
        if getattr(options, name) < 1:
            problems.append(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    if options.seed < 0:
        problems.append(f"--seed {options.seed}: must not be negative")
    if problems:
        raise RefusedError("\n".join(problems))
    return options


def probe(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracies, differences and what they were measured on."""
    packages.require_vision()
    from moa_megatron.vision import probing
    from moa_megatron.vision.export import read_run

    pretrained = read_run(options.run, options.step)
    encoder = pretrained.model.encoder
    train, valid = (read_images(options, pretrained, split) for split in ("train", "valid"))
    strange = sorted(set(valid.classes) - set(train.classes))
    if strange:
        raise RefusedError(f"validation has classes that training lacks: {', '.join(strange[:5])}")
    numbers = np.array([train.classes.index(name) for name in valid.classes])
    valid_labels = numbers[valid.labels]
    chosen = probing.draw_labelled(
        train.labels, train.classes, options.labels_per_class, options.draws, options.seed
    )
    images = probing.ImageSets(train.pixels, valid.pixels, encoder.shape.scaling)
    std = pretrained.args.init_method_std
    sources = {
        TRAINED: probing.of_encoder(encoder, images, options.features),
        UNTRAINED: probing.of_untrained(encoder, images, options.features, options.seed, std),
        PIXELS: probing.of_pixels(images),
    }
    correct = probing.evaluate(sources, chosen, train.labels, valid_labels)
    return {
        "run": str(options.run),
        "step": pretrained.step,
        "features": options.features,
        "labels_per_class": options.labels_per_class,
        "draws": len(chosen),
        "train_images": len(train.labels),
        "valid_images": len(valid_labels),
        "classes": len(train.classes),
        "accuracy": {
            name: {kind: dataclasses.asdict(probing.accuracy(c)) for kind, c in kinds.items()}
            for name, kinds in correct.items()
        },
        "difference": {
            name: {
                kind: dataclasses.asdict(probing.difference(correct[TRAINED][kind], c))
                for kind, c in correct[name].items()
            }
            for name in (UNTRAINED, PIXELS)
        },
    }


def read_images(options: argparse.Namespace, pretrained: Pretrained, split: str) -> LabelledImages:
    """Images of one split, as the run's evaluation reads them."""
    from moa_megatron.vision.labelled import read_labelled

    args, name = pretrained.args, f"{split}_data_path"
    inputs = getattr(options, name) or getattr(args, name)
    if not inputs:
        raise RefusedError(f"the run names no images: give --{name.replace('_', '-')} DIR")
    return read_labelled(
        [Path(one) for one in inputs],
        Path(args.moa_cache_dir) / "images",
        pretrained.model.shape.image,
        crop_fraction=args.mae_eval_crop,
        limit=options.max_images,
        grey=args.moa_grey_images,
        max_bad_fraction=args.moa_max_bad_images,
        seed=options.seed,
        description=split,
    )


def text(record: dict[str, Any]) -> str:
    """The table, with what its intervals mean and the verdict."""
    labels = record["labels_per_class"]
    rows = []
    for name, kinds in record["accuracy"].items():
        rows.append((name, *(_percent(kinds[kind]) for kind in kinds)))
    for name, kinds in record["difference"].items():
        rows.append((f"encoder minus {name}", *(_percent(kinds[kind], "+") for kind in kinds)))
    varied = f"over {record['draws']} draws of labels" if record["draws"] > 1 else "over images"
    lines = [
        f"step {record['step']}, features {record['features']} ({_FEATURES[record['features']]}), "
        f"{'all' if labels is None else labels} labels per class of {record['classes']}, "
        f"{record['valid_images']:,} validation images",
        telemetry.table(("accuracy in %", "linear probe", "nearest neighbours"), rows),
        f"± 95 % confidence, Student's t {varied}; differences are paired",
    ]
    for name, kinds in record["difference"].items():
        lines.append(f"against {name}: {'; '.join(f'{k} {_verdict(v)}' for k, v in kinds.items())}")
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """Accuracies with their intervals, one panel for each probe."""
    kinds = list(record["accuracy"][TRAINED])
    try:
        with telemetry.picture(path, columns=len(kinds), size=(4.6, 2.4)) as panels:
            for axes, kind in zip(panels, kinds):
                for row, found in enumerate(record["accuracy"].values()):
                    interval = found[kind]
                    half = 100 * (interval["high"] - interval["mean"])
                    axes.barh(row, 100 * interval["mean"], xerr=half, color=f"C{row}", capsize=3)
                axes.set_yticks(range(len(record["accuracy"])), list(record["accuracy"]))
                axes.invert_yaxis()
                axes.set_title(f"{kind}, {record['labels_per_class'] or 'all'} labels per class")
                axes.set_xlabel("accuracy in %")
    except ValueError as error:  # matplotlib's, for a kind of file it does not write
        raise RefusedError(f"--picture {path}: {error}") from error


def _percent(interval: dict[str, float], sign: str = "") -> str:
    half = 100 * (interval["high"] - interval["mean"])
    return f"{format(100 * interval['mean'], sign + '.1f')} ± {half:.1f}"


def _verdict(interval: dict[str, float]) -> str:
    if interval["low"] > 0:
        return "better"
    return "worse" if interval["high"] < 0 else "no difference shown"


if __name__ == "__main__":
    sys.exit(main())
