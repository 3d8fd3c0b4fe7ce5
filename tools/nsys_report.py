#!/usr/bin/env python3
"""Reads captures of nsys and says where the time of a training step goes.

    tools/nsys_report.py runs/moe-2b/nsight/*.sqlite
    tools/nsys_report.py rank0.sqlite rank8.sqlite --html report.html --json report.json

Steps, kernel classes, communication that no compute hides, MoA's own share, NVTX ranges, copies;
with several ranks also who is slow. Needs no GPU, no nsys and no package beyond Python 3.12; a
.nsys-rep is exported first, where nsys is there. docs/profiling.md explains the numbers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moa_megatron.runstate import REFUSED  # noqa: E402
from tools.nsight import page, report, text  # noqa: E402


def main(words: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help=".sqlite or .nsys-rep, one per rank"
    )
    parser.add_argument("--json", metavar="FILE", help="the numbers, ns; - for stdout, alone")
    parser.add_argument("--html", type=Path, metavar="FILE", help="one page with a timeline")
    parser.add_argument(
        "--unprofiled-ms", type=float, metavar="MS", help="time of a step without profiler"
    )
    options = parser.parse_args(words)
    try:
        found, ranks = report.build([exported(file) for file in options.files])
        if options.html:
            options.html.write_text(page.render(found, ranks), encoding="utf-8")
        numbers = json.dumps(found, indent=1, allow_nan=False)
        if options.json and options.json != "-":
            Path(options.json).write_text(numbers + "\n", encoding="utf-8")
    except ValueError as error:
        sys.stderr.write(f"refused: {error}\n")
        return REFUSED
    except OSError as error:
        sys.stderr.write(f"refused: {error.filename} cannot be written: {error.strerror}\n")
        return REFUSED
    print(numbers if options.json == "-" else text.render(found, options.unprofiled_ms))
    if options.html and options.json != "-":
        print(f"\npage {options.html}")
    return 0


def exported(file: Path) -> Path:
    """The SQLite export of a capture: the file itself, one beside it, or a new one by nsys.

    Raises:
        ValueError: where nsys is needed and missing, or fails.
    """
    if file.suffix != ".nsys-rep":
        return file
    target = file.with_suffix(".sqlite")
    if target.exists() and target.stat().st_mtime >= file.stat().st_mtime:
        return target
    command = ["nsys", "export", "--type", "sqlite", "--force-overwrite", "true"]
    command += ["--output", str(target), str(file)]
    if not file.exists():
        raise ValueError(f"{file} does not exist")
    if shutil.which("nsys") is None:
        raise ValueError(
            f"{file} must be exported, and nsys is not here; run this where it is, and give the "
            f".sqlite: {' '.join(command)}"
        )
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"nsys cannot export {file}: {(done.stderr or done.stdout).strip()}")
    return target


if __name__ == "__main__":
    sys.exit(main())
