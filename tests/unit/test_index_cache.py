"""Dataset indices built ahead: the run builds none, kills leave none half, two jobs agree."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moa_megatron import preflight
from moa_megatron.data import index_cache
from moa_megatron.data.token_files import pair

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "prepare_data.py"
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"
}  # fmt: skip
SHORT = ["--train-iters", "2", "--eval-iters", "1", "--eval-interval", "2"]


def test_cut_arrays_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "h-GPTDataset-train-shuffle_index.npy", np.arange(100))
    whole = (tmp_path / "h-GPTDataset-train-shuffle_index.npy").read_bytes()
    assert index_cache.damaged(tmp_path, 0) == {}
    path = tmp_path / "g-GPTDataset-train-shuffle_index.npy"
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        (problem,) = index_cache.damaged(tmp_path, 0).values()
        assert str(path) in problem and f"{size:,} bytes" in problem
        # It may be one that a run is just writing.
        assert index_cache.damaged(tmp_path) == {}
    os.utime(path, (0, 0))
    assert list(index_cache.damaged(tmp_path)) == [path]
    assert index_cache.damaged(tmp_path / "none") == {}


def index(cache: Path, prefix: Path, kinds: tuple[str, ...]) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    stem = f"{cache}/h-GPTDataset-train-"
    Path(f"{stem}description.txt").write_text(json.dumps({"dataset_path": str(prefix)}))
    for kind in kinds:
        np.save(f"{stem}{kind}_index.npy", np.arange(9))


def test_an_index_of_older_data_is_named(tmp_path: Path) -> None:
    prefix, cache = tmp_path / "x", tmp_path / "x" / "cache" / "GPTDataset_indices"
    for path in pair(prefix):
        path.touch()
        os.utime(path, (1e9, 1e9))
    index(cache, prefix, ("document", "sample", "shuffle"))
    assert index_cache.damaged(cache, 0) == {}
    os.utime(pair(prefix)[0])
    os.utime(cache / "h-GPTDataset-train-description.txt", (1.5e9, 1.5e9))
    (problem,) = index_cache.damaged(cache).values()
    assert "index of older data" in problem and "x.bin has been written since" in problem
    # Without --data-cache-path Megatron keeps indices beside each pair.
    args = argparse.Namespace(
        mock_data=False, data_cache_path=None, data_path=[str(prefix)], train_data_path=None,
        valid_data_path=None, test_data_path=None, data_args_path=None,
        per_split_data_args_path=None,
    )  # fmt: skip
    (refused,) = preflight.index_problems(args)
    assert problem in refused and f"remove {cache}" in refused and "--build-index" in refused


def test_only_whole_indices_are_built_upon(tmp_path: Path) -> None:
    index(tmp_path, tmp_path / "none", ("document",))
    assert index_cache._complete(tmp_path, set()) == []
    index(tmp_path, tmp_path / "none", ("sample", "shuffle"))
    assert len(index_cache._complete(tmp_path, set())) == 4
    bad = {tmp_path / "h-GPTDataset-train-sample_index.npy"}
    assert index_cache._complete(tmp_path, bad) == []


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora in shards and their blend, as the tools print it."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_text(
        "".join(
            f'{{"text": "document number {i} of a corpus {"x y " * 40}"}}\n' for i in range(300)
        )
    )
    done = subprocess.run(
        [sys.executable, str(TOOL), "a.jsonl", "--output", "x", "--train-tokenizer", "300",
         "--split-valid", "0.2", "--shard-tokens", "9000"],
        cwd=folder, capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "flags").write_text(done.stdout.split("train with: ")[1].strip())
    return folder


def flags(corpus: Path, cache: Path) -> list[str]:
    printed = (corpus / "flags").read_text().split()
    return ["tiny-dense", *printed, "--seq-length", "64", *SHORT, "--data-cache-path", str(cache)]


def build(corpus: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TOOL), "--build-index", *flags(corpus, cache)],
        cwd=corpus, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip


def contents(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.iterdir() if path.is_file()}


@pytest.mark.slow
def test_the_run_finds_every_index(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    jobs = [build(corpus, cache) for _ in range(2)]
    for job in jobs:
        printed, errors = job.communicate(timeout=200)
        assert job.returncode == 0, errors
    before = contents(cache)
    assert sum("BlendedDataset" in name for name in before) == 3
    assert sum("GPTDataset-train-shuffle" in name for name in before) >= 2
    assert not [path for path in cache.iterdir() if path.is_dir()]
    alone = tmp_path / "alone"
    _, errors = build(corpus, alone).communicate(timeout=200)
    names = {name for name in before if name.endswith(".npy")}
    assert {n: contents(alone)[n] for n in names} == {n: before[n] for n in names}
    # The run: it loads all of them and builds none.
    folder = tmp_path / "run"
    words = [sys.executable, "-m", "moa_megatron.pretrain", *flags(corpus, cache)]
    done = subprocess.run(
        [*words, "--run-dir", str(folder)], cwd=corpus, capture_output=True, text=True,
        env=ENVIRONMENT, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = (folder / "logs" / "rank0.log").read_text()
    assert "Load the GPTDataset train indices" in log and "Load the BlendedDataset indices" in log
    assert "Build and save" not in log
    assert contents(cache) == before
    # A run refuses what a kill has cut; building mends it.
    victim = next(path for path in cache.iterdir() if path.name.endswith("shuffle_index.npy"))
    os.truncate(victim, 150)
    os.utime(victim, (0, 0))
    done = subprocess.run(
        [*words, "--dry-run"], cwd=corpus, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 78 and f"{victim}: cut, 150 bytes" in done.stderr
    printed, errors = build(corpus, cache).communicate(timeout=200)
    assert f"{victim}: cut" in errors and "it is built anew" in errors
    assert f"built {victim.name}" in printed
    assert contents(cache) == before


@pytest.mark.slow
def test_a_kill_leaves_no_index(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    job = build(corpus, cache)
    deadline = time.monotonic() + 100
    while not list(cache.glob(".building-*/*.npy")) and time.monotonic() < deadline:
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.001)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert index_cache.damaged(cache, 0) == {}
    complete = {name for name in contents(cache) if name.endswith("description.txt")}
    for name in complete:
        assert len(list(cache.glob(name.replace("description.txt", "*")))) >= 3


@pytest.mark.slow
def test_refusals(corpus: Path, tmp_path: Path) -> None:
    for words, message in (
        ([], "no recipe given"),
        (["tiny-dens"], "recipe 'tiny-dens' does not exist"),
        (["tiny-dense", "--mock-data"], "--mock-data: random tokens have no index"),
        (flags(corpus, tmp_path)[:-2], "--data-cache-path is missing"),
    ):
        done = subprocess.run(
            [sys.executable, str(TOOL), "--build-index", *words], cwd=corpus,
            capture_output=True, text=True, env=ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == 78 and message in done.stderr, done.stderr
