"""One Slurm of two nodes for all tests of the launcher."""

import os
from collections.abc import Iterator

import pytest

from tests.helpers import slurm


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm.Cluster]:
    if reason := slurm.missing():
        # CI must not pass because nothing ran.
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with slurm.Cluster() as running:
        yield running
