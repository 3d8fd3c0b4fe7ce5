"""tools/doctor.py over two nodes of a real Slurm."""

import json
import subprocess
import time
from pathlib import Path

from tests.e2e.runs import ROOT, environment
from tests.helpers.slurm import NODES, Cluster


def test_all_nodes_are_one_report(cluster: Cluster, shared: Path) -> None:
    tool = (".venv/bin/python", "tools/doctor.py", "--multi-node", "--json", "--time-limit", "90")
    command = ["srun", "-N2", "-n2", "--mem=100", *tool, "--run-dir", str(shared)]
    env = {**environment(), **cluster.env, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.stdout, done.stderr
    said = json.loads(done.stdout)
    together = {f["check"]: f for f in said["findings"] if f["group"] in ("nodes", "collectives")}
    for name in ("nodes", "clocks", "run folder", "all-reduce", "all-gather", "all-to-all"):
        assert together[name]["level"] == "ok", said
    assert "2 nodes, 2 tasks" in together["nodes"]["message"]
    assert "gloo, 2 ranks" in together["all-reduce"]["message"]
    assert [(r["host"], r["rank"]) for r in said["nodes"]] == list(zip(NODES, (0, 1)))
    # The nodes' name is that of this one host, which may well know itself by loopback only.
    errors = {f["check"] for f in said["findings"] if f["level"] == "error"} - {"host name"}
    assert not errors, said
    assert done.returncode == said["exit_code"]
    assert list(shared.iterdir()) == [], "what was written to try the disk is gone"
    deadline = time.monotonic() + 10  # srun may end before the kernel has cleaned up behind it
    while (left := cluster.processes("doctor_checks.worker")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
