"""Runs checks in a process of their own, for those which change torch or Megatron globally.

Importing Megatron takes seconds, so one process runs all the checks of a module and reports each.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 300


def outcomes(
    file: str, checks: list[str], ranks: int = 1, variables: dict[str, str] | None = None
) -> dict[str, str]:
    """The failures of the functions `checks` of a test file: by name a traceback, or ''.

    With several ranks each check runs on all of them, over gloo, and one failure is enough.
    `variables` join the environment of the process.
    """
    module = ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment |= variables or {}
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", __name__, module, folder]
                + [str(rank), str(ranks), *checks],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        printed = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
        failures = dict.fromkeys(checks, "")
        for rank, output in enumerate(printed):
            report = Path(folder, f"{rank}.json")
            if not report.exists():
                return dict.fromkeys(checks, f"rank {rank} ended early:\n{output}")
            for name, failure in json.loads(report.read_text()).items():
                failures[name] = failures[name] or failure
    return failures


def _main(module: str, folder: str, rank: str, ranks: str, checks: list[str]) -> None:
    if int(ranks) > 1:
        import torch.distributed as dist

        store = dist.FileStore(f"{folder}/store", int(ranks))  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(ranks))
    functions = importlib.import_module(module)
    report = {}
    for name in checks:
        try:
            getattr(functions, name)()
            report[name] = ""
        except BaseException:  # SystemExit too: some defects end the process
            report[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])
