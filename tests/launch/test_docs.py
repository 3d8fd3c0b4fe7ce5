"""Every command of docs/launching.md runs, with only sizes and paths made small."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT, SMALL_MOE, environment
from tests.helpers.slurm import Cluster

DOC = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("   #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", DOC, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
TINY = shlex.join([*SMALL_MOE, "--train-iters", "2"])


def small(command: str, folder: Path) -> str:
    """The same command for a cluster of two nodes with four GPUs in name only, and no data."""
    data = r"--(train-data-path|valid-data-path|tokenizer-type|tokenizer-model) \S+ *"
    if re.search(data, command):
        command = re.sub(data, "", command) + " --mock-data"
    for old, new in (
        ("--nodes 4", "--nodes 2"),
        ("--gpus-per-node 8", "--gpus-per-node 1"),
        ("runs/first", str(folder / "first")),
        ("runs/dense-0.12b-sweep-20261122-101500", str(folder / "sweep")),
    ):
        command = command.replace(old, new)
    if command.startswith("./launch/submit.py") and "--rerun" not in command:
        dry = "" if "--dry-run" in command else " --dry-run"
        return f"{command} --gpus-per-node 4 --sbatch mem=100{dry} --run-dir {folder / 'new'}"
    if command.startswith("sbatch"):
        run = f"--run-dir {folder / 'by-hand'}"
        options = f"sbatch --wait --mem=100 --output={folder}/%j.out"
        command = command.replace("sbatch", options, 1).replace("moe-2b --mock-data", "tiny-moe")
        return f"{command} {TINY} --expert-model-parallel-size 2 {run}"
    if "local.sh tiny-moe" in command:
        return f"{command} {TINY}"
    return command


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    sweep = shared / "sweep"
    (sweep / "lr=1").mkdir(parents=True)
    point = {"index": 0, "name": "lr=1", "settings": {"lr": "1"}, "run_dir": "lr=1"}
    text = json.dumps({"recipe": "tiny-moe", "flags": [], "points": [point]})
    (sweep / "sweep.json").write_text(text)
    (sweep / "lr=1" / "status.json").write_text(
        '{"state": "finished", "exit_code": 0, "step": 2, "validation_loss": 3.0}'
    )
    return shared


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda text: re.sub(r"\W+", "-", text)[:60])
def test_command(command: str, folder: Path, cluster: Cluster) -> None:
    if "tensorboard.sh" in command:
        command = f"timeout 8 {command} --port 16007"  # it serves until it is stopped
    script = small(command, folder)
    slurm = {name: cluster.env[name] for name in ("SLURM_CONF", "PATH")}
    done = subprocess.run(
        ["bash", "-c", script],
        env=environment(**slurm),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    logs = "".join(path.read_text() for path in folder.glob("*.out"))
    print(script, done.stdout, done.stderr, logs, sep="\n")
    assert done.returncode == (124 if "tensorboard.sh" in command else 0)
    if command.startswith("sbatch"):
        status = json.loads((folder / "by-hand" / "status.json").read_text())
        assert status["state"] == "finished" and status["step"] == 2


def test_the_page_has_the_commands_users_look_for() -> None:
    text = "\n".join(COMMANDS)
    for word in ("local.sh", "submit.py", "sbatch", "--array-sweep", "--rerun", "tensorboard.sh"):
        assert word in text, word
