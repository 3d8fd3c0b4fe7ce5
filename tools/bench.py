#!/usr/bin/env python3
"""Times MoA over Megatron's fixed activation: the op, a layer, whole runs.

  --op      the mixture over SwiGLU: time, copy bandwidth, memory
  --layer   a whole FFN over Megatron's MLP, and what its parts take
  --experts all routed experts of a rank: sequential, grouped, on Transformer Engine, FP8
  --step    whole runs of a recipe: start-up and steps (the default)
  --static  the GPU kernels' machine code, compiled here; needs no GPU

A mode with --help lists its options. Contenders run in turn, so that a drift of the machine meets
all of them; quote the ratios. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moa_megatron.runstate import FAILED, REFUSED  # noqa: E402

EXAMPLES = {
    "op": """
  tools/bench.py --op                                    defaults of this machine's device
  tools/bench.py --op --variants bi --dtype bf16 --rows 16384 --width 853 3413
  tools/bench.py --op --json op.json --chart op.png""",
    "layer": """
  tools/bench.py --layer                                 dense FFN and one expert
  tools/bench.py --layer --kinds dense --hidden-size 1280 --width 3413 --variants bi""",
    "experts": """
  tools/bench.py --experts                               one MoE layer's share of moe-2b
  tools/bench.py --experts --experts-per-rank 8 --variants qd --fp8 tensorwise blockwise""",
    "step": """
  tools/bench.py                                         tiny-moe, three pairs of runs
  tools/bench.py --step --recipe tiny-dense --steps 40 --pairs 5 --at-least moa=0.9
  tools/bench.py --step --recipe moe-2b --steps 15 \\
      --flags '--mock-data --moa-align 64 --micro-batch-size 16 --global-batch-size 16'""",
    "static": """
  tools/bench.py --static --arch 90 --variant bi --width 2048""",
}


def main(words: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    modes = [mode for mode in EXAMPLES if f"--{mode}" in words]
    if len(modes) > 1:
        sys.stderr.write(f"refused: {' and '.join('--' + m for m in modes)}: one mode at a time\n")
        return REFUSED
    if not modes and {"-h", "--help"} & set(words):
        print(f"{__doc__}\nexamples:{''.join(EXAMPLES.values())}")
        return 0
    mode = modes[0] if modes else "step"
    module = importlib.import_module(f"tools.benchmarks.{mode}")
    options = _parser(mode, module).parse_args(words)
    from tools.benchmarks import report
    from tools.benchmarks.runs import RunFailed
    from tools.benchmarks.timing import CheckFailed

    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = module.run(options) | {"environment": report.environment()}
    except CheckFailed as error:
        sys.stderr.write(f"no numbers, the result is wrong: {error}\n")
        return FAILED
    except ValueError as error:
        sys.stderr.write(f"refused: {error}\n")
        return REFUSED
    except RunFailed as error:
        sys.stderr.write(f"a run failed: {error}\n")
        return FAILED
    line = json.dumps(result)
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    if getattr(options, "chart", None):
        module.draw(result, options.chart)
    print(line)
    met = all(target["met"] for target in result.get("targets", {}).values())
    return 0 if met else FAILED


def _parser(mode: str, module: ModuleType) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"tools/bench.py --{mode}",
        description=module.__doc__,
        epilog=f"examples:{EXAMPLES[mode]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(f"--{mode}", action="store_true", help="this mode")
    module.add_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the last line here too")
    if hasattr(module, "draw"):
        parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the ratios")
    return parser


if __name__ == "__main__":
    sys.exit(main())
