"""Processes that have Megatron from the start: forked from one that has imported it on the host."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def context() -> ForkServerContext:
    """A multiprocessing context whose server is started once per pytest session.

    The import takes seconds, a fork milliseconds. It has left no thread behind, so that a fork
    lacks nothing; what a process changes in torch or Megatron, no other one sees.
    """
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(["tests.helpers.on_host"])
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, _ENVIRONMENT, PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()
    return chosen
