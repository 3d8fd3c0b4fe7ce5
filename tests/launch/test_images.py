"""A run on images, submitted with the same command as one on text."""

from pathlib import Path

from tests.e2e.runs import SMALL_MAE
from tests.helpers.slurm import Cluster
from tests.helpers.submitted import submit


def test_images_are_read_on_both_nodes(cluster: Cluster, shared: Path) -> None:
    words = [*SMALL_MAE, "--nodes", "2", "--use-distributed-optimizer"]
    run = submit(
        cluster, shared / "images", "tiny-mae", *words, "--moa-cache-dir", str(shared / "cache")
    )
    assert run.wait() == ["COMPLETED"], run.log()
    assert run.status["state"] == "finished" and run.status["step"] == 6
    assert Path(run.status["reconstruction"]).stat().st_size > 1000
    assert len(list((shared / "cache" / "images").glob("*.npz"))) == 2
    assert not run.orphans()
