"""Runs checks in a process of their own, for those which change torch or Megatron globally.

One process runs all the checks of a module and reports each.
"""

import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

from tests.helpers import forks

ROOT = Path(__file__).parents[2]
TIMEOUT = 300


def outcomes(
    file: str,
    checks: list[str],
    ranks: int = 1,
    variables: dict[str, str] | None = None,
    fresh: bool = False,
) -> dict[str, str]:
    """The failures of the functions `checks` of a test file: by name a traceback, or ''.

    With several ranks each check runs on all of them, over gloo, and one failure is enough. The
    process has Megatron on the host already, unless it is `fresh` or gets `variables`, which join
    the environment that it starts in.
    """
    module = ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)
    starts_anew = fresh or variables is not None
    context = multiprocessing.get_context("spawn") if starts_anew else forks.context()
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **(variables or {})}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_main, args=(module, folder, rank, ranks, checks))
            for rank in range(ranks)
        ]
        with mock.patch.dict(os.environ, environment):
            for process in processes:
                process.start()
        end = time.monotonic() + TIMEOUT
        for process in processes:
            process.join(max(end - time.monotonic(), 0))
            process.kill()  # one that has not ended
        failures = dict.fromkeys(checks, "")
        for rank in range(ranks):
            report = Path(folder, f"{rank}.json")
            if not report.exists():
                printed = Path(folder, f"{rank}.out")
                said = printed.read_text(errors="replace") if printed.exists() else ""
                return dict.fromkeys(checks, f"rank {rank} ended early:\n{said}")
            for name, failure in json.loads(report.read_text()).items():
                failures[name] = failures[name] or failure
    return failures


def _main(module: str, folder: str, rank: int, ranks: int, checks: list[str]) -> None:
    output = os.open(f"{folder}/{rank}.out", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    # A spawned process has the path of its parent instead.
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    warnings.simplefilter("ignore")
    if ranks > 1:
        import torch.distributed as dist

        store = dist.FileStore(f"{folder}/store", ranks)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    functions = importlib.import_module(module)
    report = {}
    for name in checks:
        try:
            getattr(functions, name)()
            report[name] = ""
        except BaseException:  # SystemExit too: some defects end the process
            report[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(report))
