"""The nsys report against answers worked out by hand, on files as two nsys versions write them.

The files are synthetic (tests/helpers/nsys_file.py); that their tables are like real ones is what
tools/nsight/capture.py says and this test cannot show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.nsys_file import BACKWARD, MAIN, PID, VERSIONS, NsysFile, training
from tools.nsight import report


def build(file: NsysFile, folder: Path, version: str = "new", name: str = "run") -> dict[str, Any]:
    return report.build([file.write(folder / f"{name}.sqlite", version)])[0]


@pytest.fixture(params=VERSIONS)
def rank(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return build(training(), tmp_path, request.param)["ranks"][0]  # type: ignore[no-any-return]


def test_steps(rank: dict[str, Any]) -> None:
    steps = rank["steps"]
    assert (steps["source"], steps["n"], steps["excluded"]) == ("NVTX", 2, ["5"])
    expected = {
        # Of step 5 only: the device is busy 100 of 200 to 1100, and waits for a launch to 1040.
        "5": {"wall": 900, "busy": 100, "idle": 800, "compute": 100, "starved": 740},
        "6": {
            "wall": 1500,
            "busy": 850,
            "idle": 650,
            "compute": 600,
            "communication": 400,
            "nccl": 400,
            "dispatcher": 0,
            "exposed": 200,
            "copies": 50,
            "starved": 60 + 460,
            "moa": 300,
            "moa_alone": 200,
        },
        "7": {"wall": 400, "busy": 360, "idle": 40, "compute": 360, "starved": 30, "moa": 0},
    }
    for row in steps["rows"]:
        assert expected[row["step"]].items() <= row.items()
    assert steps["summary"]["wall"] == {"min": 400, "median": 950, "max": 1500}
    assert steps["summary"]["exposed"] == {"min": 0, "median": 100, "max": 200}


def test_classes_by_name_and_by_range(rank: dict[str, Any]) -> None:
    times = {row["class"]: (row["time"], row["count"]) for row in rank["classes"]}
    assert times == {
        "GEMM": (300, 2),
        "MoA mixture kernels": (50, 1),
        "MoA gates": (100, 2),
        "communication: NCCL": (200, 1),
        "optimizer": (30, 1),
        "memcpy": (25, 1),
    }
    shares = {row["class"]: row["share"] for row in rank["classes"]}
    assert shares["GEMM"] == pytest.approx(300 / 705)
    assert rank["moa"]["share_of_kernel_time"] == pytest.approx(150 / 680)


def test_ranges_and_backward_by_sequence_number(rank: dict[str, Any]) -> None:
    regions = rank["moa"]["regions"]
    assert regions == {
        "train.step": {"forward": 350, "backward": 0},
        "moa.gate": {"forward": 50, "backward": 50},
        "moa.fc1": {"forward": 150, "backward": 0},
        "moa.mixture": {"forward": 50, "backward": 0},
    }
    tree = {tuple(node["path"]): node["time"] for node in rank["ranges"]}
    experts = ("train.step", "moe.routed", "moe.experts")
    assert tree["train.step",] == 650
    assert tree[experts] == 50 + 150 + 50 + 50
    assert tree[*experts, "moa.gate", "(backward)"] == 50
    assert tree["Optimizer.step#AdamW.step",] == 30
    assert not any("aten" in name for path in tree for name in path)


def test_kernels_copies_ceiling_coverage(rank: dict[str, Any]) -> None:
    top = rank["kernels"][0]
    assert (top["kernel"], top["class"], top["count"]) == ("nvjet_hsh", "GEMM", 2)
    assert (top["time"], top["mean"]) == (300, 300)
    assert rank["copies"] == [
        {
            "kind": "Host-to-Device",
            "memory": "pinned to device",
            "count": 1,
            "bytes": 500,
            "time": 25,
        }
    ]
    assert rank["ceiling"] == {
        "hide_exposed_communication": pytest.approx(950 / 850 - 1),
        "free_moa_kernels": pytest.approx(950 / 850 - 1),
        "never_starved": pytest.approx(950 / 675 - 1),
    }
    assert rank["coverage"] == {
        "activities": 9,
        "without_launch": 0,
        "without_range": 1,
        "streams": 2,
    }


def test_versions_give_the_same_report(tmp_path: Path) -> None:
    old, new = (build(training(), tmp_path, version) for version in VERSIONS)
    assert "2022.2" in old["files"][0].pop("nsys") and "2024.5" in new["files"][0].pop("nsys")
    assert old == new


def test_keys_of_the_json(tmp_path: Path) -> None:
    found = build(training(), tmp_path)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["schema", "files", "warnings", "ranks", "survey"]
    assert found["schema"] == 1 and found["survey"] is None and found["warnings"] == []
    assert list(found["files"][0]) == ["file", "nsys", "host", "session_start", "gpus"]
    assert list(found["ranks"][0]) == [
        *("rank", "gpu", "steps", "classes", "kernels", "moa", "ranges", "copies", "ceiling"),
        "coverage",
    ]


def test_compute_on_one_stream_hides_communication_on_two(tmp_path: Path) -> None:
    file = NsysFile()
    file.kernel("gemm_a", 0, 100, launch=0, stream=1)
    file.kernel("gemm_b", 50, 150, launch=0, stream=2)
    file.kernel("ncclDevKernel_A", 120, 200, launch=0, stream=3)
    file.kernel("deep_ep::dispatch", 180, 260, launch=0, stream=4)
    file.kernel("gemm_c", 220, 240, launch=0, stream=1)
    row = build(file, tmp_path)["ranks"][0]["steps"]["rows"][0]
    assert (row["compute"], row["communication"]) == (150 + 20, 140)
    assert (row["nccl"], row["dispatcher"]) == (80, 80)
    assert row["exposed"] == 140 - 30 - 20
    assert (row["busy"], row["idle"]) == (260, 0)


def test_ranges_of_two_threads_do_not_mix(tmp_path: Path) -> None:
    file = NsysFile()
    file.range("outer", 0, 100, thread=MAIN)
    file.range("other", 0, 100, thread=BACKWARD)
    file.range("inner", 10, 20, thread=MAIN)
    file.range("elsewhere", 30, 90, thread=MAIN, domain=1)
    file.range("open", 150, None, thread=MAIN)
    for thread, launch in ((MAIN, 15), (BACKWARD, 15), (MAIN, 30), (MAIN, 45), (MAIN, 200)):
        start = 1000 + 10 * launch + (thread == BACKWARD)
        file.kernel("k", start, start + 1, launch=launch, thread=thread)
    tree = {tuple(n["path"]): n["count"] for n in build(file, tmp_path)["ranks"][0]["ranges"]}
    assert tree == {
        ("outer",): 3,
        ("outer", "inner"): 1,
        ("other",): 1,
        ("open",): 1,
    }


def test_recomputed_ranges_stand_under_the_layer_that_recomputes(tmp_path: Path) -> None:
    file = NsysFile()
    file.range("train.step 1", 0, 100)
    file.range("layer", 5, 95)
    file.range("CheckpointFunction, seq = 3", 10, 90)
    backward = "autograd::engine::evaluate_function: CheckpointFunctionBackward, seq = 3"
    file.range(backward, 200, 300, thread=BACKWARD)
    file.range("moa.gate", 210, 220, thread=BACKWARD)
    file.kernel("nvjet", 500, 600, launch=215, thread=BACKWARD)
    file.kernel("nvjet", 600, 700, launch=250, thread=BACKWARD)
    rank = build(file, tmp_path)["ranks"][0]
    tree = {tuple(node["path"]): node["time"] for node in rank["ranges"]}
    assert tree["train.step", "layer", "moa.gate"] == 100
    assert tree["train.step", "layer", "(backward)"] == 100


def one_rank(shift: int, slow: int, epoch: int, host: str = "node0") -> NsysFile:
    """Three steps with a GEMM and a collective, which ends on all ranks at the same time."""
    file = NsysFile(epoch=epoch, host=host)
    for number in range(3):
        begin = 10_000_000 * number - shift + 1_000_000
        file.range(f"train.step {number}", begin, begin + 100)
        file.kernel("nvjet", begin + 1000, begin + 1000 + slow, launch=begin + 10)
        after = begin + 1000 + slow
        file.kernel("ncclDevKernel_X", after, begin + 4_000_000, launch=begin + 20, stream=9)
    return file


def survey(tmp_path: Path, *files: NsysFile) -> dict[str, Any]:
    paths = [file.write(tmp_path / f"run-rank{i}.sqlite") for i, file in enumerate(files)]
    return report.build(paths)[0]  # type: ignore[no-any-return]


def test_straggler_after_putting_clocks_together(tmp_path: Path) -> None:
    """Rank 1's session starts 400 us later, so its own clock shows earlier times."""
    fast, slow = one_rank(0, 2_000_000, 10**18), one_rank(400_000, 2_200_000, 10**18 + 400_000)
    found = survey(tmp_path, fast, slow)
    table = found["survey"]
    assert [row["rank"] for row in table["ranks"]] == ["rank 0", "rank 1"]
    assert table["compute"] == {
        "slowest": "rank 1",
        "excess": pytest.approx(2.2 / 2.1 - 1),
        "straggler": False,
    }
    assert table["collectives"]["matched"] == 2
    assert table["collectives"]["last"] == {"rank 0": 0, "rank 1": 2}
    assert table["collectives"]["lateness"] == {"rank 1": 200_000}
    assert "rank 1 starts 100% of 2 matched collectives last, by 200 us" in table["verdict"]
    assert not found["warnings"]


def test_compute_straggler_and_no_straggler(tmp_path: Path) -> None:
    even = [one_rank(0, 2_000_000, 10**18) for _ in range(3)]
    assert survey(tmp_path, *even)["survey"]["verdict"].startswith("no straggler")
    table = survey(tmp_path, *even[:2], one_rank(0, 3_000_000, 10**18, "node1"))["survey"]
    assert table["compute"] == {"slowest": "rank 2", "excess": 0.5, "straggler": True}
    assert "rank 2 computes 50.0% longer" in table["verdict"]
    assert "several hosts" in table["verdict"]


def test_ranks_of_one_file_are_told_apart(tmp_path: Path) -> None:
    file = training()
    other = (9 << 24) | 5
    file.range("train.step 5", 100, 180, thread=other)
    file.kernel("nvjet", 400, 500, launch=150, thread=other, device=1)
    ranks = build(file, tmp_path)["ranks"]
    assert [rank["rank"] for rank in ranks] == [
        f"run, process {PID >> 24}, device 0",
        "run, process 9, device 1",
    ]
    assert ranks[1]["coverage"]["activities"] == 1


def test_gaps_are_stated(tmp_path: Path) -> None:
    file = NsysFile(epoch=None)
    file.kernel("nvjet", 0, 100)
    file.graph(200, 300)
    file.fill(300, 310, 64)
    file.diagnose(1, "Profiling has started.")
    file.diagnose(2, "Not all NVTX events might have been collected.")
    file.diagnose(3, "Out of memory.")
    found = build(file, tmp_path)
    assert found["ranks"][0]["steps"]["source"] == "the whole capture"
    for part in (
        "Not all NVTX events",
        "Out of memory",
        "no NVTX ranges",
        "1 of 3 device activities have no launch",
        "--cuda-graph-trace=node",
        "no session start time",
        "no step markers",
    ):
        assert sum(part in warning for warning in found["warnings"]) == 1, part
    assert len(found["warnings"]) == 7
    classes = {row["class"] for row in found["ranks"][0]["classes"]}
    assert classes == {"GEMM", "CUDA graph, not opened", "memset"}
    single = NsysFile()
    single.range("train.step 3", 0, 10)
    single.kernel("nvjet", 20, 30, launch=5)
    assert "one step only" in build(single, tmp_path)["warnings"][0]
