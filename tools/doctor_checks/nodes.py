"""All tasks of a Slurm step: each looks at its own host, rank 0 puts them together.

They talk over plain sockets, so that a node where torch is broken can say so. Rank 0 also learns
how far each clock is off, whether all see the same run folder, and runs one smoke test over all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from moa_megatron import packages
from tools.doctor_checks import collectives
from tools.doctor_checks.differences import GROUP, compare
from tools.doctor_checks.host import Finding, Host, existing

_PINGS = 5
_MAX_LINE = 16 << 20


@dataclass(frozen=True)
class Step:
    """This task's place in the step."""

    rank: int
    tasks: int
    local: int
    several: bool  # more than one task on this node
    job: str
    address: str
    port: int

    @classmethod
    def of(cls, host: Host, port: int | None = None) -> Step:
        """From Slurm's variables.

        Raises:
            ValueError: outside of srun.
        """
        env = host.env
        missing = [n for n in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID") if n not in env]
        if missing:
            raise ValueError(
                f"--multi-node: {missing[0]} is not set; start it by srun, such as "
                "srun -N2 --ntasks-per-node=1 .venv/bin/python tools/doctor.py --multi-node"
            )
        job = env["SLURM_JOB_ID"]
        counts = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))
        # Beside the port of a training run in the same job, and below those given to clients.
        number = int(port or 30000 + int(job) % 2000)
        return cls(
            rank=int(env["SLURM_PROCID"]),
            tasks=int(env["SLURM_NTASKS"]),
            local=int(env.get("SLURM_LOCALID", "0")),
            several=any(int(n) > 1 for n in re.findall(r"(?<!x)\b\d+", counts)),
            job=f"{job}.{env.get('SLURM_STEP_ID', '0')}",
            address=first_address(host),
            port=number,
        )


def first_address(host: Host) -> str:
    """Where rank 0 is: the first node, by an address where its name does not resolve."""
    env = host.env
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    name = first_node(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    if name and host.addresses_of(name):
        return name
    shown = host.ask("scontrol", "show", "node", "-o", name) or ""
    match = re.search(r" NodeAddr=(\S+)", shown)
    return match[1] if match else env.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1"


def first_node(names: str) -> str:
    """``a[07-09,12]-ib,b1`` -> ``a07-ib``; inside containers there is no scontrol to ask."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", names)
    return "".join(part or "" for part in match.groups()) if match else ""


class Line:
    """JSON objects over a socket, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._file = connection.makefile("rb")

    def send(self, **message: Any) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, limit: float) -> dict[str, Any]:
        """The next object.

        Raises:
            OSError: it does not come, or is none.
        """
        self._socket.settimeout(max(limit, 0.01))
        text = self._file.readline(_MAX_LINE)
        try:
            said = json.loads(text)
        except ValueError as error:
            raise OSError("the other side has closed, or is no doctor") from error
        return said if isinstance(said, dict) else {}

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def member(host: Host, step: Step, findings: list[Finding], wait: float, limit: float) -> None:
    """Any rank but the first: reports, answers, takes part in the smoke test.

    Raises:
        OSError: rank 0 cannot be reached.
    """
    line = _connect(step, wait)
    line.send(**_hello(host, step, findings))
    while "plan" not in (said := line.receive(wait + limit)):
        if "token" in said:
            line.send(sees=os.path.exists(said["token"]), free=_free(host))
        else:
            line.send(time=time.time())
    if said["plan"] is not None:
        ranks = collectives.run(collectives.Plan(**said["plan"]))
        line.send(ranks=[asdict(rank) for rank in ranks])
    line.close()


def lead(
    host: Host, step: Step, findings: list[Finding], wait: float, limit: float, smoke: bool
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Rank 0: what every task said, and what only all of them together show."""
    token = existing(host.run_dir) / f".doctor-{step.job}-{os.getpid()}"
    reports, lines = [_hello(host, step, findings)], {}
    found: list[Finding] = []
    with contextlib.suppress(OSError):  # the check of writing has said so
        token.touch()
    try:
        lines = _gather(step, wait, reports, token if token.exists() else None)
        absent = sorted(set(range(step.tasks)) - {r["rank"] for r in reports})
        if absent:
            found.append(_absent(absent, step, wait))
        found += compare(reports)
        plans = _plans(reports, step, limit) if smoke and not absent else {}
        for rank, line in lines.items():
            line.send(plan=plans.get(rank))
        if plans:
            found += _smoke(plans, lines, reports, limit)
    finally:
        token.unlink(missing_ok=True)
        for line in lines.values():
            line.close()
    return reports, found


def _absent(absent: list[int], step: Step, wait: float) -> Finding:
    text = f"rank {', '.join(map(str, absent))} of {step.tasks} did not report within {wait:g} s"
    cure = f"can its node reach {step.address}:{step.port}? firewall, interfaces; or --wait 600"
    return Finding("error", "tasks", text, cure, group=GROUP)


def _hello(host: Host, step: Step, findings: list[Finding]) -> dict[str, Any]:
    here = collectives.gpus(host)
    return {
        "job": step.job,
        "rank": step.rank,
        "local": step.local,
        "host": host.name(),
        "torch": packages.importable("torch"),
        "gpus": here,
        "workers": 1 if step.several else max(here, 1),
        "device": step.local % max(here, 1) if step.several else 0,
        "free": _free(host),
        "findings": [asdict(finding) for finding in findings],
    }


def _free(host: Host) -> int | None:
    try:
        state = os.statvfs(existing(host.run_dir))
    except OSError:
        return None
    return state.f_bavail * state.f_frsize


def _connect(step: Step, wait: float) -> Line:
    deadline = time.monotonic() + wait
    while True:
        try:
            return Line(socket.create_connection((step.address, step.port), timeout=5))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)  # rank 0 may still be at its own checks


def _gather(step: Step, wait: float, reports: list[dict[str, Any]], token: Any) -> dict[int, Line]:
    lines: dict[int, Line] = {}
    deadline = time.monotonic() + wait
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    server = socket.create_server(
        ("", step.port), family=family, backlog=step.tasks, dualstack_ipv6=both
    )
    with server:
        while len(lines) < step.tasks - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                line = Line(server.accept()[0])
                said = line.receive(min(10, left))
                if said.get("job") != step.job:
                    raise OSError("another job's")
                said["offset"] = _offset(line)
                if token is not None:
                    line.send(token=str(token))
                    said |= line.receive(10)
            except OSError:
                continue
            lines[said["rank"]] = line
            reports.append(said)
    return lines


def _offset(line: Line) -> float:
    """How far the other clock is ahead, by the quickest of a few exchanges."""
    best = (float("inf"), 0.0)
    for _ in range(_PINGS):
        sent = time.time()
        line.send(ping=True)
        there = line.receive(10)["time"]
        back = time.time()
        best = min(best, (back - sent, there - (sent + back) / 2))
    return best[1]


def _plans(reports: list[dict[str, Any]], step: Step, limit: float) -> dict[int, dict[str, Any]]:
    """Task -> its part of one world; on CPUs where a node has no GPU."""
    if not all(report["torch"] for report in reports):  # a finding of its own
        return {}
    backend = "nccl" if all(report["gpus"] for report in reports) else "gloo"
    world = sum(report["workers"] for report in reports)
    if world < 2:
        return {}
    plans, first, port = {}, 0, collectives.free_port()
    for report in sorted(reports, key=lambda r: r["rank"]):
        plans[report["rank"]] = {
            "backend": backend,
            "local": report["workers"],
            "device": report["device"],
            "world": world,
            "first": first,
            "address": step.address,
            "port": port,
            "limit": limit,
        }
        first += report["workers"]
    return plans


def _smoke(
    plans: dict[int, dict[str, Any]],
    lines: dict[int, Line],
    reports: list[dict[str, Any]],
    limit: float,
) -> Iterator[Finding]:
    plan = collectives.Plan(**plans[0])
    ranks = collectives.run(plan)
    for line in lines.values():
        with contextlib.suppress(OSError):
            ranks += [collectives.Rank(**rank) for rank in line.receive(limit + 10)["ranks"]]
    names = {report["rank"]: report["host"] for report in reports}
    hosts = {
        part["first"] + i: names[task] for task, part in plans.items() for i in range(part["local"])
    }
    heard = {rank.rank for rank in ranks}
    ranks += [collectives.Rank(rank) for rank in hosts if rank not in heard]
    yield from collectives.judge(plan, ranks, hosts)
