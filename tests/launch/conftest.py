"""One Slurm of two nodes for all tests of the launcher."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT
from tests.helpers import slurm


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm.Cluster]:
    if reason := slurm.missing():
        # CI must not pass because nothing ran.
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with slurm.Cluster() as running:
        yield running


@pytest.fixture(autouse=True)
def empty_queue(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that failed leaves jobs, which would keep the next ones from their nodes."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").clear()


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A folder that all nodes see: /tmp is refused as one that each node has for itself."""
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="test-", dir=ROOT / "runs") as folder:
        yield Path(folder)
