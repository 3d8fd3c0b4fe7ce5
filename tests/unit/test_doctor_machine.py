"""tools/doctor.py on machines that are made up: interpreter, limits, disks, network."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.doctor import found, levels, machine
from tools.doctor_checks import limits, network, python, storage

MEMINFO = "MemTotal: 1000000 kB\nMemAvailable: {} kB\n"
NO_LIMITS = {
    f"RLIMIT_{name}": (resource.RLIM_INFINITY,) * 2
    for name in ("NOFILE", "NPROC", "STACK", "MEMLOCK")
}


def test_python(tmp_path: Path) -> None:
    assert levels(python.version, machine(tmp_path, python=(3, 12, 9))) == {"python": "ok"}
    wrong = found(python.version, machine(tmp_path, python=(3, 9, 1)))["python"]
    assert wrong.level == "error" and "3.9.1" in wrong.message and "setup.sh" in wrong.cure


def test_user_packages(tmp_path: Path) -> None:
    (tmp_path / "site" / "torch-2.0.dist-info").mkdir(parents=True)
    facts = {"user_site": str(tmp_path / "site")}
    host = machine(tmp_path, user_site_used=True, **facts)
    leak = found(python.user_site, host)["user packages"]
    assert (
        leak.level == "warning" and "1 packages" in leak.message and "PYTHONNOUSERSITE" in leak.cure
    )
    assert levels(python.user_site, machine(tmp_path, user_site_used=False, **facts)) == {
        "user packages": "note"
    }


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1", "error"),
        ("CUDA_LAUNCH_BLOCKING", "1", "warning"),
        ("CUDA_LAUNCH_BLOCKING", "0", None),
        ("NCCL_P2P_DISABLE", "1", "warning"),
        ("NCCL_DEBUG", "TRACE", "warning"),
        ("NCCL_DEBUG", "WARN", None),
        ("PYTHONHOME", "/usr", "error"),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so", "warning"),
    ],
)
def test_variables(tmp_path: Path, name: str, value: str, level: str | None) -> None:
    findings = found(python.variables, machine(tmp_path, env={name: value}))
    if level is None:
        assert set(findings) == {"variables"} and findings["variables"].level == "ok"
    else:
        assert findings[name].level == level and f"unset {name}" in findings[name].cure


@pytest.mark.parametrize(
    ("value", "level"), [(None, "ok"), ("4", "ok"), ("64", "warning"), ("x", "error")]
)
def test_threads(tmp_path: Path, value: str | None, level: str) -> None:
    env = {} if value is None else {"OMP_NUM_THREADS": value}
    assert levels(python.threads, machine(tmp_path, env=env, cpus=8)) == {"OMP_NUM_THREADS": level}


def test_one_core_for_each_task(tmp_path: Path) -> None:
    assert levels(limits.cpus, machine(tmp_path, cpus=32, online=64)) == {"CPUs": "ok"}
    trap = machine(tmp_path, env={"SLURM_JOB_ID": "7"}, cpus=1, online=64)
    finding = found(limits.cpus, trap)["CPUs"]
    assert finding.level == "warning" and "--cpus-per-task" in finding.cure


@pytest.mark.parametrize(
    "files",
    [
        {"/proc/self/cgroup": "0::/job/step", "/sys/fs/cgroup/job/cpu.max": "150000 100000"},
        {
            "/proc/self/cgroup": "4:cpu,cpuacct:/job\n0::/",
            "/sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "150000",
            "/sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
        },
    ],
    ids=["v2, set on the parent", "v1"],
)
def test_cpu_quota_of_a_cgroup(tmp_path: Path, files: dict[str, str]) -> None:
    finding = found(limits.cpus, machine(tmp_path, files, cpus=8, online=8))["CPU quota"]
    assert finding.level == "warning" and "1.5 CPUs of 8" in finding.message


@pytest.mark.parametrize(
    ("limit", "free", "expected"),
    [
        ("max", 500000, {"memory": "ok"}),
        ("max", 10000, {"memory": "warning"}),
        ("102400000", 500000, {"memory limit": "warning", "memory": "ok"}),
        ("512000000", 500000, {"memory limit": "note", "memory": "ok"}),
    ],
)
def test_memory(tmp_path: Path, limit: str, free: int, expected: dict[str, str]) -> None:
    for cgroup, place in (
        ("0::/a", "/sys/fs/cgroup/a/memory.max"),
        ("9:memory:/a\n0::/", "/sys/fs/cgroup/memory/a/memory.limit_in_bytes"),
    ):
        text = limit if limit != "max" or "max" in place else str(2**63 - 4096)
        files = {"/proc/self/cgroup": cgroup, place: text, "/proc/meminfo": MEMINFO.format(free)}
        assert levels(limits.memory, machine(tmp_path / place.strip("/"), files)) == expected


def test_ulimits(tmp_path: Path) -> None:
    assert levels(limits.ulimits, machine(tmp_path, **NO_LIMITS)) == {"ulimits": "ok"}
    few = machine(tmp_path, **{**NO_LIMITS, "RLIMIT_NOFILE": (1024, 1024)})
    finding = found(limits.ulimits, few)["open files"]
    assert finding.level == "warning" and "hard limit" in finding.cure
    locked = {**NO_LIMITS, "RLIMIT_MEMLOCK": (65536, 65536)}
    assert levels(limits.ulimits, machine(tmp_path, **locked)) == {"ulimits": "ok"}
    rdma = machine(tmp_path, {"/sys/class/infiniband/mlx5_0/x": ""}, **locked)
    assert levels(limits.ulimits, rdma) == {"locked memory": "error"}


@pytest.mark.parametrize(
    ("total", "free", "level"),
    [
        (1 << 34, 1 << 34, "ok"),
        (1 << 26, 1 << 26, "warning"),
        (1 << 34, 0, "error"),
        (0, 0, "error"),
    ],
)
def test_shared_memory(tmp_path: Path, total: int, free: int, level: str) -> None:
    host = machine(tmp_path, shm=(total, free))
    assert levels(limits.shared_memory, host) == {"/dev/shm": level}


def mounts(folder: Path, kind: str) -> dict[str, str]:
    return {"/proc/mounts": f"/dev/a / ext4 rw 0 0\nserver:/x {folder} {kind} rw 0 0\n"}


def test_caches(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    env = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(shared), "SLURM_NTASKS": "8"}
    host = machine(tmp_path, mounts(shared, "lustre"), env)
    findings = found(storage.caches, host)
    assert findings["kernels of this project"].level == "warning"
    assert "lustre" in findings["kernels of this project"].message
    assert findings["TRITON_CACHE_DIR"].level == "warning", "the launchers put it there too"
    host = machine(tmp_path, mounts(shared, "xfs"), env)
    assert set(levels(storage.caches, host).values()) == {"ok"}
    host.env = {**env, "XDG_CACHE_HOME": "/proc/nowhere"}
    assert levels(storage.caches, host)["XDG_CACHE_HOME"] == "error"
    host.env = {"HOME": "/proc/nowhere"}
    assert levels(storage.caches, host) == {"XDG_CACHE_HOME": "warning"}


def test_room_and_a_write(tmp_path: Path) -> None:
    host = machine(tmp_path)
    host.run_dir = tmp_path / "not" / "yet"
    for free, level in ((1 << 27, "ok"), (1 << 22, "warning"), (10, "error")):
        host.facts["statvfs"] = SimpleNamespace(f_bavail=free, f_frsize=4096, f_favail=5, f_files=0)
        assert levels(storage.room, host) == {"free disk": level}
    host.facts["statvfs"].f_files = 100
    assert levels(storage.room, host)["inodes"] == "error"
    assert levels(storage.write, host) == {"write": "ok"}
    assert not list(tmp_path.glob(".doctor*"))
    host.run_dir = Path("/proc/runs")
    assert levels(storage.write, host) == {"write": "error"}


@pytest.mark.parametrize(
    ("kind", "nodes", "level"),
    [
        ("ext4", "1", "ok"),
        ("tmpfs", "1", "warning"),
        ("ext4", "2", "warning"),
        ("nfs4", "2", "ok"),
        ("tmpfs", "2", "warning"),
    ],
)
def test_where_runs_go(tmp_path: Path, kind: str, nodes: str, level: str) -> None:
    host = machine(tmp_path, mounts(Path("/data"), kind), {"SLURM_NNODES": nodes})
    host.run_dir = Path("/data/runs")
    assert levels(storage.location, host) == {"run folder": level}
    host.run_dir = Path("/tmp/runs")
    assert levels(storage.location, host)["run folder"] == ("ok" if nodes == "1" else "error")


def test_names_of_hosts(tmp_path: Path) -> None:
    table = "  |-- 10.0.0.7\n     /32 host LOCAL\n"
    for address, nodes, level in (
        (["10.0.0.7"], "2", "ok"),
        (["127.0.1.1"], "1", "note"),
        (["127.0.1.1"], "2", "error"),
        (["10.9.9.9"], "2", "warning"),
        ([], "1", "error"),
    ):
        files, env = {"/proc/net/fib_trie": table}, {"SLURM_NNODES": nodes}
        host = machine(tmp_path, files, env, hostname="n1", addresses={"n1": address})
        assert levels(network.host_name, host) == {"host name": level}, address


def test_loopback(tmp_path: Path) -> None:
    for addresses, level in ((["127.0.0.1"], "ok"), ([], "error"), (["::1"], "warning")):
        host = machine(tmp_path, addresses={"localhost": addresses})
        assert levels(network.loopback, host) == {"loopback": level}
    down = {"/sys/class/net/lo/flags": "0x8", "/sys/class/net/lo/operstate": "down"}
    host = machine(tmp_path, down, addresses={"localhost": ["127.0.0.1"]})
    assert levels(network.loopback, host) == {"loopback": "error"}


@pytest.mark.parametrize(
    ("names", "env", "expected"),
    [
        ("lo eth0", {}, {"interfaces": "ok"}),
        ("lo eth0 ib0", {}, {"interfaces": "note"}),
        ("lo eth0 docker0", {"SLURM_NNODES": "2"}, {"interfaces": "warning"}),
        ("lo eth0", {"GLOO_SOCKET_IFNAME": "eno1"}, {"GLOO_SOCKET_IFNAME": "error"}),
        ("lo eth0", {"NCCL_SOCKET_IFNAME": "et"}, {"interfaces": "ok"}),
        ("lo eth0", {"NCCL_SOCKET_IFNAME": "=et"}, {"NCCL_SOCKET_IFNAME": "error"}),
        ("lo eth0", {"NCCL_SOCKET_IFNAME": "^docker0,lo"}, {"interfaces": "ok"}),
        ("lo eth0", {"GLOO_SOCKET_IFNAME": "^lo"}, {"GLOO_SOCKET_IFNAME": "error"}),
        (
            "lo eth0 docker0",
            {"NCCL_SOCKET_IFNAME": "docker0", "SLURM_NNODES": "2"},
            {"NCCL_SOCKET_IFNAME": "error"},
        ),
    ],
)
def test_interfaces(
    tmp_path: Path, names: str, env: dict[str, str], expected: dict[str, str]
) -> None:
    files = {f"/sys/class/net/{name}/operstate": "up" for name in names.split()}
    assert expected.items() <= levels(network.interfaces, machine(tmp_path, files, env)).items()


def test_infiniband(tmp_path: Path) -> None:
    assert levels(network.infiniband, machine(tmp_path / "none")) == {"InfiniBand": "ok"}
    for states, level in ((("4: ACTIVE",) * 2, "ok"), (("4: ACTIVE", "1: DOWN"), "note")):
        files = {"/dev/infiniband/uverbs0": ""}
        for index, state in enumerate(states):
            files[f"/sys/class/infiniband/mlx5_{index}/ports/1/state"] = state
        assert levels(network.infiniband, machine(tmp_path / "a", files)) == {"InfiniBand": level}
    dead = machine(tmp_path / "b", {"/sys/class/infiniband/mlx5_0/ports/1/state": "1: DOWN"})
    assert levels(network.infiniband, dead) == {"InfiniBand": "error", "RDMA": "error"}


def test_clock(tmp_path: Path) -> None:
    asked = "timedatectl show --property=NTPSynchronized --value"
    chrony = "System time     : {} seconds slow of NTP time\nLeap status     : Normal\n"
    for answers, level in (
        ({asked: "yes\n"}, "ok"),
        ({asked: "no\n"}, "warning"),
        ({"chronyc -n tracking": chrony.format("0.000012")}, "ok"),
        ({"chronyc -n tracking": chrony.format("7.5")}, "warning"),
        ({}, "note"),
    ):
        assert levels(network.clock, machine(tmp_path, answers=answers)) == {"clock": level}
    assert levels(network.clock, machine(tmp_path, time=0.0)) == {"clock": "error"}
