"""The pool reports failures with their tracebacks, ends hanging cases and goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.helpers.pool import CaseFailed, Pool

HERE = "tests.parallel.test_pool"


def total() -> float:
    value = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(value)
    return value.item()


def fails_on_one_rank() -> None:
    if dist.get_rank() == 1:
        raise ValueError("told to fail")
    dist.barrier()


def hangs_on_one_rank() -> None:
    if dist.get_rank() == 1:
        time.sleep(3600)
    dist.barrier()


def dies() -> None:
    os._exit(3)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.stop()


def test_runs_in_groups_of_any_size(pool: Pool) -> None:
    assert pool.run(f"{HERE}:total", 2) == [3.0, 3.0]
    assert pool.run(f"{HERE}:total", 1) == [1.0]
    with pytest.raises(ValueError, match="ranks=3"):
        pool.run(f"{HERE}:total", 3)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("fails_on_one_rank", r"rank 1: Traceback[\s\S]*ValueError: told to fail"),
        ("hangs_on_one_rank", r"rank 1: no answer in time[\s\S]*hangs_on_one_rank"),
        ("dies", "the process died"),
    ],
    ids=["fails", "hangs", "dies"],
)
def test_failure_is_reported_and_forgotten(pool: Pool, case: str, message: str) -> None:
    begin = time.monotonic()
    timeout = 2.0 if "hangs" in case else 60.0
    with pytest.raises(CaseFailed, match=message):
        pool.run(f"{HERE}:{case}", 2, timeout=timeout)
    assert time.monotonic() - begin < 50, "a failure must not wait for the others' time limit"
    assert pool.run(f"{HERE}:total", 2) == [3.0, 3.0]
