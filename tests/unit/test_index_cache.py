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


KINDS = {
    "GPTDataset": ("document_index", "sample_index", "shuffle_index"),
    "BlendedDataset": ("dataset_index", "dataset_sample_index"),
}


def write_index(cache: Path, name: str, *prefixes: str, time: float) -> list[Path]:
    """An index `name` (HASH-CLASS-SPLIT) of the class, as Megatron writes it; description first."""
    cache.mkdir(parents=True, exist_ok=True)
    parts: list[object] = [{"dataset_path": prefix, "num_samples": 9} for prefix in prefixes]
    class_ = name.split("-")[1]
    described = {"datasets": parts} if class_ == "BlendedDataset" else parts[0]
    files = [cache / f"{name}-description.txt"]
    files[0].write_text(json.dumps(described))
    for kind in KINDS[class_]:
        files.append(cache / f"{name}-{kind}.npy")
        np.save(files[-1], np.arange(5))
    for path in files:
        os.utime(path, (time, time))
    return files


def write_pair(prefix: Path, time: float) -> str:
    for suffix in (".bin", ".idx"):
        path = Path(f"{prefix}{suffix}")
        path.write_bytes(b"")
        os.utime(path, (time, time))
    return str(prefix)


def test_indices_of_earlier_data_are_stale(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    x, y = write_pair(tmp_path / "x", 1000), write_pair(tmp_path / "y", 3000)
    write_index(cache, "a-GPTDataset-train", x, time=2000)
    files = write_index(cache, "b-GPTDataset-train", y, time=2000)
    write_index(cache, "c-BlendedDataset-train", x, y, time=2000)
    write_index(cache, "d-GPTDataset-train", y, time=4000)
    (cache / "e-GPTDataset-train-description.txt").write_text("{")
    assert index_cache.stale(cache, [x, y]) == {
        "b-GPTDataset-train": y, "c-BlendedDataset-train": y
    }  # fmt: skip
    # Other runs' data is not this run's business.
    assert index_cache.stale(cache, [x]) == {}
    # One file of the earlier data is enough, unless a run is just writing the others.
    for path in files[:-1]:
        os.utime(path, (4000, 4000))
    assert "b-GPTDataset-train" in index_cache.stale(cache, [y])
    os.utime(files[0])
    assert index_cache.stale(cache, [y]) == {}
    assert "b-GPTDataset-train" in index_cache.stale(cache, [y], settled_seconds=0)
    # Not whole: Megatron builds it anew.
    files[-1].unlink()
    assert index_cache.stale(cache, [y], settled_seconds=0) == {}
    assert index_cache.stale(tmp_path / "none", [y]) == {}


def test_a_run_refuses_stale_indices(tmp_path: Path) -> None:
    x = write_pair(tmp_path / "x", 3000)
    args = argparse.Namespace(
        mock_data=False, data_path=["0.5", x], train_data_path=None, valid_data_path=None,
        test_data_path=None, data_args_path=None, per_split_data_args_path=None,
        data_cache_path=str(tmp_path / "cache"),
    )  # fmt: skip
    assert preflight.index_problems(args) == []
    write_index(tmp_path / "cache", "a-GPTDataset-train", x, time=2000)
    (problem,) = preflight.index_problems(args)
    assert f"{tmp_path / 'cache'}: 1 dataset indices are older" in problem
    assert f"{x}.bin" in problem and "--build-index" in problem
    # Without a cache Megatron keeps them in a folder beside each pair.
    args.data_cache_path = None
    assert preflight.index_problems(args) == []
    folder = Path(x) / "cache" / "GPTDataset_indices"
    write_index(folder, "a-GPTDataset-train", x, time=2000)
    (problem,) = preflight.index_problems(args)
    assert str(folder) in problem and "--data-cache-path DIR" in problem
    # The list of the data cannot be read: that is reported elsewhere.
    args.data_path, args.data_args_path = None, str(tmp_path / "none")
    assert preflight.index_problems(args) == []


def test_what_no_run_may_read_is_removed(tmp_path: Path) -> None:
    x = write_pair(tmp_path / "x", 3000)
    cache = tmp_path / "cache"
    write_index(cache, "a-GPTDataset-train", x, time=2000)
    cut, *_ = write_index(cache, "b-GPTDataset-train", x, time=4000)[1:]
    cut.write_bytes(b"")
    os.utime(cut, (4000, 4000))
    kept = write_index(cache, "c-GPTDataset-train", x, time=4000)
    index_cache._remove_useless(cache, [x])
    assert index_cache.stale(cache, [x], 0) == {} and index_cache.damaged(cache, 0) == {}
    assert set(kept) < set(cache.iterdir()) and not cut.exists()
    assert not list(cache.glob("a-*"))


def test_only_whole_indices_are_built_upon(tmp_path: Path) -> None:
    whole = write_index(tmp_path, "a-GPTDataset-train", "x", time=1000)
    whole += write_index(tmp_path, "b-BlendedDataset-valid", "x", time=1000)
    for number, class_ in enumerate(("GPTDataset", "GPTDataset", "BlendedDataset")):
        write_index(tmp_path, f"c{number}-{class_}-train", "x", time=1000)[number].unlink()
    write_index(tmp_path, "d-GPTDataset-train", "x", time=1000)
    (tmp_path / "notes-description.txt").write_text("of someone else")
    assert set(index_cache._complete(tmp_path, {"d-GPTDataset-train"})) == set(whole)


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
    # Data that is prepared again makes its indices, and those of the blend, stale.
    pairs = sorted(corpus.glob("x-train-*.bin"))
    times = pairs[0].stat()
    os.utime(pairs[0])
    try:
        done = subprocess.run(
            [*words, "--dry-run"], cwd=corpus, capture_output=True, text=True, env=ENVIRONMENT
        )
        assert done.returncode == 78 and f"{cache}: 2 dataset indices are older" in done.stderr
        printed, errors = build(corpus, cache).communicate(timeout=200)
    finally:
        os.utime(pairs[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert f"older than {pairs[0].with_suffix('')}.bin" in errors
    assert printed.count("built ") == 7 and contents(cache) == before


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
