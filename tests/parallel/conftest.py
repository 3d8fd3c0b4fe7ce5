"""One pool of four processes for all parallel tests."""

from collections.abc import Iterator

import pytest

from tests.helpers.parity import Bench
from tests.helpers.pool import Pool


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    pool = Pool(4, setup="tests.helpers.pool:megatron_on_host")
    yield Bench(pool)
    pool.stop()
