#!/usr/bin/env python3
"""Writes the encoder of a masked autoencoder's run as safetensors, for use without Megatron.

    tools/export_encoder.py runs/tiny-mae
    tools/export_encoder.py runs/mae-vit-b --step 250228 --out encoder.safetensors

In Python, with plain PyTorch:

    from moa_megatron.vision.export import load_encoder
    encoder, shape = load_encoder(Path("encoder.safetensors"))
    features = encoder.features(shape.scaling.apply(images))  # [b, 3, h, w] in [0, 1] -> [b, width]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moa_megatron.recipes import Parser, RefusedError  # noqa: E402
from moa_megatron.runstate import REFUSED, STORAGE, is_storage_error  # noqa: E402
from moa_megatron.vision.export import export_encoder, read_run  # noqa: E402


def main(words: Sequence[str] | None = None) -> int:
    """Writes the file and says what is in it; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, or its folder of checkpoints")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--out", type=Path, help="the file; default: encoder.safetensors in RUN")
    try:
        options = parser.parse_args(words)
        out = options.out or options.run / "encoder.safetensors"
        pretrained = read_run(options.run, options.step)
        export_encoder(pretrained, out)
    except RefusedError as error:
        sys.stderr.write(f"refused: {error}\n")
        return REFUSED
    except OSError as error:
        sys.stderr.write(f"refused: {out} cannot be written: {error.strerror}\n")
        return STORAGE if is_storage_error(error) else REFUSED
    encoder = pretrained.model.encoder
    count = sum(parameter.numel() for parameter in encoder.parameters())
    moa = encoder.moa
    kind = moa.mixing if moa.mixing == "fixed" else f"{moa.mixing} {moa.variant}"
    print(f"{out}: encoder of step {pretrained.step}, {count:,} parameters in float32, {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
