"""A real Slurm of two nodes on this host, for tests of what is submitted to one.

Slurm has no stand-in that behaves like it, so its daemons themselves run, in a folder of their own.
A keeper process owns them. However the tests end, the pipe to the keeper closes; it then kills the
daemons and what is left of the jobs, and removes the folder.

Different from a large cluster, on purpose: the scheduler does not wait for its rounds, a requeued
job starts again after seconds, ``KillWait`` is short, nodes claim CPUs and GPUs that the host
lacks, and there is no accounting (``scontrol`` and ``squeue`` know jobs, ``sacct`` does not). Node
names do not resolve: inside jobs, the address of every node is ``ADDRESS``. Without cgroups, a
process whose parent has died is out of Slurm's reach: it outlives its job and holds the step's
output, which makes the step end a minute late.

Who is told what (Slurm 22.05, as seen here; srun's processes include all their descendants):

- ``scancel JOB``, ``scontrol requeue JOB`` (from inside the job too) and the time limit: SIGCONT
  and SIGTERM at once to srun's processes, the batch script and its children; SIGKILL after
  ``KILL_WAIT`` to all of them. ``scontrol show job`` then says ``JobState=COMPLETING`` in each
  case; what tells them apart is ``Reason=TimeLimit`` for the limit, ``EndTime=Unknown`` and
  ``Restarts`` one higher for a requeue, neither for a cancel.
- ``scancel -s SIGNAL JOB``, SIGTERM too: srun's processes only; with ``-b`` the batch script only,
  with ``-f`` all. The job stays RUNNING. ``scancel`` of a job that has ended exits with 1.
- ``--signal=SIGNAL@N``: SIGCONT and SIGNAL to srun's processes only; ``--signal=B:SIGNAL@N`` to the
  batch script only, not to its children.
- slurmctld looks at time limits every 30 s: a signal comes up to that much early, the end late.
- SLURM_JOB_END_TIME is not set, SLURM_RESTART_COUNT only after a requeue.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

import psutil

NODES = ("n1", "n2")
ADDRESS = "127.0.0.1"
# Claimed by each node. CUDA_VISIBLE_DEVICES stays unset. With --exclusive, SLURM_GPUS_ON_NODE is
# all of them in the batch script, but in a step what --gpus-per-node asked for.
GPUS = 4
# Seconds between SIGTERM and SIGKILL for a job that is cancelled or out of time.
KILL_WAIT = 15
# A credential's life; a requeued job waits a second longer (121 s with Slurm's default of 120).
CREDENTIAL_SECONDS = 5
TERMINAL = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED")
    + ("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)
_PACKAGES = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm"}
_KEEPER = Path(__file__).with_name("slurm_keeper.py")
_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.2
_TAIL_LINES = 30

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credential}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
OverTimeLimit=0
MinJobAge=300
MessageTimeout=10
UnkillableStepTimeout=60
SlurmdParameters=config_overrides
GresTypes=gpu
"""
_NODE = (
    "NodeName={node} NodeHostname={host} NodeAddr={address} Port={port} "
    "CPUs=4 RealMemory=8000 Gres=gpu:{gpus}\n"
)
_PARTITION = "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"


class ClusterError(AssertionError):
    """What was waited for did not come; the message ends with the logs."""


def missing() -> str | None:
    """What keeps a cluster from starting here, with its fix; None where nothing does."""
    absent = [name for name in _PACKAGES if shutil.which(name, path=_path()) is None]
    if absent:
        packages = " ".join(sorted({_PACKAGES[name] for name in absent}))
        return f"needs {', '.join(absent)}: apt-get install {packages}"
    if os.geteuid() != 0:
        return f"needs root, not uid {os.geteuid()}: slurmd starts jobs as their users"
    return None


class Cluster:
    """Two idle nodes from ``start`` to ``stop``, or inside a ``with``."""

    def __init__(self) -> None:
        # Short: the path of munge's socket may have 107 characters, pytest's folders are longer.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-test-"))
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH_", "SRUN_", "SCANCEL_", "SQUEUE_", "SINFO_"))
        }
        self.env = {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the daemons and waits until both nodes are idle."""
        self._configure()
        command = [sys.executable, str(_KEEPER), str(self.folder), *NODES]
        # Its own session: Ctrl-C at the tests must not end it before it has cleaned up.
        self._keeper = subprocess.Popen(
            command, env=self.env, stdin=subprocess.PIPE, start_new_session=True
        )
        deadline = time.monotonic() + _START_SECONDS
        while self._idle() < len(NODES):
            if time.monotonic() > deadline or self._keeper.poll() is not None:
                report = self._logs()
                self.stop()
                raise ClusterError(f"no {len(NODES)} idle nodes in {_START_SECONDS} s\n{report}")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Ends every daemon and job, and removes the folder."""
        if self._keeper is not None:
            assert self._keeper.stdin is not None
            self._keeper.stdin.close()
            self._keeper.wait(_STOP_SECONDS)
            self._keeper = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str | Path, env: Mapping[str, str] | None = None) -> str:
        """What a command of Slurm's prints; ``env`` adds to the environment."""
        done = subprocess.run(
            command, env={**self.env, **(env or {})}, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            words = " ".join(map(str, command))
            raise ClusterError(f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, script: str, *options: str, name: str = "job", folder: Path) -> str:
        """Number of a job that runs ``script``, a text for bash, in ``folder``."""
        file = folder / f"{name}.sh"
        file.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        where = (f"--chdir={folder}", f"--job-name={name}")
        return self.run("sbatch", "--parsable", *where, *options, file).strip()

    def jobs(self) -> list[dict[str, str]]:
        """Every job that Slurm still knows, finished ones of the last minutes included."""
        return _records(self.run("scontrol", "show", "job", "--oneliner"))

    def job(self, job_id: str) -> dict[str, str]:
        """The record of a job, or of one element of an array (``12_3``)."""
        return _records(self.run("scontrol", "show", "job", "--oneliner", job_id))[0]

    def wait(
        self, job_id: str, timeout: float = 60.0, states: Collection[str] = TERMINAL
    ) -> dict[str, str]:
        """The record of a job once its state is one of ``states``."""
        deadline = time.monotonic() + timeout
        while (record := self.job(job_id))["JobState"] not in states:
            # A job that has ended stays so: waiting on would only hide why.
            if time.monotonic() > deadline or record["JobState"] in TERMINAL:
                raise ClusterError(
                    f"job {job_id} is {record['JobState']} ({record['Reason']}), waited {timeout} "
                    f"s for {'|'.join(sorted(states))}\n{record}\n"
                    f"{_tail(Path(record.get('StdOut', os.devnull)))}\n{self._logs()}"
                )
            time.sleep(_POLL_SECONDS)
        return record

    def cancel(self, *words: str) -> None:
        """``scancel`` with these words."""
        self.run("scancel", *words)

    def clear(self) -> None:
        """Cancels every job that has not ended, and waits for their ends."""
        left = [job["JobId"] for job in self.jobs() if job["JobState"] not in TERMINAL]
        if left:
            self.cancel(*left)
        for job in left:
            self.wait(job, 90)

    def processes(self, marker: str) -> list[int]:
        """Living processes with ``marker`` in their command or environment, but the caller's."""
        ours = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
        return [pid for pid in marked_processes(marker) if pid not in ours]

    def _configure(self) -> None:
        self.folder.chmod(0o755)  # jobs and munge's clients of every user pass through
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        ports = _free_ports(1 + len(NODES))
        common = {"host": socket.gethostname().split(".")[0], "address": ADDRESS}
        text = _CONFIGURATION.format(
            folder=self.folder,
            port=ports[0],
            credential=CREDENTIAL_SECONDS,
            kill_wait=KILL_WAIT,
            **common,
        )
        for node, port in zip(NODES, ports[1:], strict=True):
            (self.folder / f"spool-{node}").mkdir()
            text += _NODE.format(node=node, port=port, gpus=GPUS, **common)
        # Slurm takes GPUs that have files, and of files without a device only their number.
        for index in range(GPUS):
            (self.folder / f"gpu{index}").touch()
        devices = f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(devices, encoding="utf-8")
        (self.folder / "slurm.conf").write_text(text + _PARTITION, encoding="utf-8")

    def _idle(self) -> int:
        command = ["sinfo", "--noheader", "--Node", "--format=%T"]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        return done.stdout.split().count("idle")

    def _logs(self) -> str:
        return "\n".join(_tail(path) for path in sorted(self.folder.glob("*.log")))


def marked_processes(marker: str) -> list[int]:
    """Living processes with ``marker`` in their command line or environment.

    What a rank spawns names nothing in its command line, but inherits the environment.
    """
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        facts = process.info
        words = [*(facts["cmdline"] or []), *(facts["environ"] or {}).values()]
        if facts["status"] != psutil.STATUS_ZOMBIE and any(marker in word for word in words):
            found.append(process.pid)
    return found


def _path() -> str:
    """PATH with the folders of daemons, which not every user's has."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def _records(text: str) -> list[dict[str, str]]:
    """Jobs as ``scontrol --oneliner`` prints them: ``Key=value with spaces Key=...``.

    It quotes nothing, so a value ends where something like a key begins (``a Word=``).
    """
    records = []
    for line in text.splitlines():
        found = re.findall(r"(?:^|(?<= ))([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|\s*$)", line)
        if found:
            # The first of a name counts: a job's own words, in Command, come late in the line.
            records.append(dict(reversed(found)))
    return records


def _tail(path: Path) -> str:
    if not path.is_file():
        return f"-- {path}: absent"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    return "\n".join([f"-- {path}, its end:", *lines])


def _free_ports(count: int) -> list[int]:
    """Ports below those that the kernel gives to clients, which would take them in between."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20000, 30000)
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex((ADDRESS, port)) != 0:
                ports.append(port)
    return ports
