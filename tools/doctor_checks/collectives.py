"""The smoke test of collectives: starts ranks, watches where each is, ends them all."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moa_megatron import packages
from moa_megatron.attempts import CONSEQUENCES
from tools.doctor_checks import gpu
from tools.doctor_checks.host import PROJECT, Finding, Host
from tools.doctor_checks.worker import STAGES

GROUP = "collectives"
_BYTES = {"nccl": 64 << 20, "gloo": 4 << 20}
_GRACE = 2.0  # after a rank has failed: what the others say of it follows


@dataclass
class Plan:
    """The ranks of this node within a world."""

    backend: str
    local: int
    world: int
    first: int = 0
    device: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    limit: float = 20.0
    # Rank -> {"stage", "kind"}: tests make a rank hang or die.
    faults: dict[int, dict[str, str]] = field(default_factory=dict)


@dataclass
class Rank:
    """What one rank has said."""

    rank: int
    stage: str = "start"
    ready: bool = False  # it waits for the others
    failed: str = ""
    code: int | None = None
    done: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def progress(self) -> int:
        return 2 * STAGES.index(self.stage) + self.ready if self.stage in STAGES else -1

    def hear(self, line: str) -> None:
        try:
            said = json.loads(line)
        except ValueError:  # a library's own words
            return
        if not isinstance(said, dict):
            return
        if "enter" in said:
            self.stage, self.ready = said["enter"], False
        self.ready = said.get("ready", self.ready)
        if "done" in said:
            self.done[said["done"]] = said
        if "wrong" in said:
            self.failed = f"{said['wrong']} gives a wrong value: {said['text']}"
        self.failed = self.failed or said.get("failed", "")


def local_plan(host: Host, limit: float) -> Plan:
    """A rank for each GPU that is visible, or two on a CPU."""
    count = gpus(host)
    backend, ranks = ("nccl", count) if count else ("gloo", 2)
    return Plan(backend, ranks, ranks, port=free_port(), limit=limit)


def gpus(host: Host) -> int:
    """GPUs that ranks can use here."""
    visible = host.env.get("CUDA_VISIBLE_DEVICES")
    found = len(gpu.devices(host))
    if visible is None or not found:
        return found
    return min(found, len([word for word in visible.split(",") if word.strip()]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def check(host: Host, limit: float) -> Iterator[Finding]:
    """The smoke test over the ranks of this machine."""
    if not packages.importable("torch"):
        yield Finding("note", "collectives", "left out: they need torch", group=GROUP)
        return
    plan = local_plan(host, limit)
    yield from judge(plan, run(plan))


def run(plan: Plan) -> list[Rank]:
    """Starts this node's ranks; returns when all have ended, of themselves or killed."""
    ranks = [Rank(plan.first + local) for local in range(plan.local)]
    started = [_start(plan, rank.rank, local) for local, rank in enumerate(ranks)]
    try:
        _listen(plan, ranks, started)
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    return ranks


def _start(plan: Plan, rank: int, local: int) -> subprocess.Popen[bytes]:
    told = {
        "rank": rank,
        "device": plan.device + local,
        "world": plan.world,
        "backend": plan.backend,
        "address": plan.address,
        "port": plan.port,
        "limit": plan.limit,
        "bytes": _BYTES[plan.backend],
        "parent": os.getpid(),
        "fault": plan.faults.get(rank),
    }
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if plan.backend == "gloo" else {}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tools.doctor_checks.worker", json.dumps(told)],
        cwd=PROJECT,
        env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", **hidden},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _listen(plan: Plan, ranks: list[Rank], started: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + plan.limit
    pending = {}
    with selectors.DefaultSelector() as ready:
        for rank, process in zip(ranks, started):
            assert process.stdout is not None
            ready.register(process.stdout, selectors.EVENT_READ, (rank, process))
            pending[rank.rank] = b""
        while ready.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in ready.select(min(left, 0.5)):
                rank, process = key.data
                data = os.read(key.fd, 1 << 16)
                *lines, pending[rank.rank] = (pending[rank.rank] + data).split(b"\n")
                for line in lines:
                    rank.hear(line.decode(errors="replace"))
                if not data:
                    ready.unregister(key.fileobj)
                    rank.code = process.wait()
                if rank.failed or rank.code:
                    deadline = min(deadline, time.monotonic() + _GRACE)


def judge(plan: Plan, ranks: list[Rank], hosts: dict[int, str] | None = None) -> Iterator[Finding]:
    """One finding for each collective, or the rank to look at."""

    def named(rank: Rank) -> str:
        where = f" on {hosts[rank.rank]}" if hosts and rank.rank in hosts else ""
        return f"rank {rank.rank}{where}"

    what = f"{plan.backend}, {plan.world} ranks"
    wrong = [r for r in ranks if r.failed or r.code not in (0, None)]
    late = [r for r in ranks if r.code is None]
    if wrong:
        # What a rank says whose peer has gone is the consequence, not the cause.
        first = min(wrong, key=lambda r: (bool(CONSEQUENCES.search(r.failed)), r.progress))
        reason = first.failed or _ended(first.code)
        text = f"{what}: {named(first)} failed in {first.stage}: {reason}"
        yield Finding("error", "collectives", text, _cure(plan, first.stage), group=GROUP)
    elif late:
        yield _hang(plan, late, ranks, what, named)
    else:
        for name in STAGES[2:-1]:
            slowest = min((r.done[name] for r in ranks if name in r.done), key=lambda d: d["busbw"])
            text = f"{what}, {int(slowest['bytes']) >> 20} MiB: values right, "
            text += f"algbw {slowest['algbw']:.2f} GB/s"
            text += f", busbw {slowest['busbw']:.2f} GB/s" if plan.world > 1 else ""
            yield Finding("ok", name, text, group=GROUP)


def _hang(plan: Plan, late: list[Rank], ranks: list[Rank], what: str, named: Any) -> Finding:
    furthest = max(ranks, key=lambda r: r.progress)
    behind = min(late, key=lambda r: r.progress)
    stage, limit = behind.stage, f"ended after {plan.limit:g} s"
    names = ", ".join([named(r) for r in late if r.progress == behind.progress][:8])
    if stage in ("start", "import"):  # not told apart from a hang: in both nothing but time passes
        text = f"{what}: {names} still imports torch after {plan.limit:g} s: a slow or busy disk?"
        return Finding("warning", "collectives", text, "--time-limit 120", group=GROUP)
    if behind.progress == furthest.progress:
        text = f"{what}: all ranks wait in {stage}; {limit}"
    else:
        place = "in" if behind.ready else "before"
        text = (
            f"{what}: {names} hangs {place} {stage}, while others wait in {furthest.stage}; {limit}"
        )
    return Finding("error", "collectives", text, _cure(plan, stage), group=GROUP)


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _cure(plan: Plan, stage: str) -> str:
    if stage in ("start", "import"):
        return "see torch and GPUs above; this rank could not use them"
    if stage == "rendezvous":
        return f"can its host reach {plan.address}:{plan.port}? firewall, interfaces above"
    if plan.backend == "nccl":
        return "NCCL_DEBUG=INFO shows where; then try NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1"
    return "GLOO_SOCKET_IFNAME names the network that all ranks see"
