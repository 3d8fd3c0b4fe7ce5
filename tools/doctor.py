#!/usr/bin/env python3
"""Is this environment sane? Answered before a GPU-hour is spent.

Looks at Python, GPUs and driver, torch, NCCL, Transformer Engine, DALI, limits, disks, network,
Slurm, container and the project itself, and runs collectives over all local ranks. Each finding is
ok, note, warning or error, with its cure. Needs the standard library only.

Exit code: 0 no error, 1 an error, 78 bad usage.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

if sys.version_info < (3, 9):  # noqa: UP036  a host's own Python may be old
    sys.stderr.write(f"refused: Python {sys.version.split()[0]}: run .venv/bin/python {__file__}\n")
    sys.exit(78)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moa_megatron.runstate import REFUSED  # noqa: E402
from tools.doctor_checks import (  # noqa: E402
    cluster,
    collectives,
    gpu,
    images,
    libraries,
    limits,
    network,
    nodes,
    project,
    python,
    report,
    storage,
    torch_view,
)
from tools.doctor_checks.host import Check, Finding, Host  # noqa: E402

_EPILOG = """\
examples:
  .venv/bin/python tools/doctor.py                        everything, about a minute
  tools/doctor.py --quick                                 seconds: nothing is imported or started
  tools/doctor.py --run-dir /shared/runs --recipe moe-2b --tensor-model-parallel-size 2
  tools/doctor.py --json > doctor.json
  srun -N2 --ntasks-per-node=1 .venv/bin/python tools/doctor.py --multi-node

Flags behind --recipe NAME are the run's own, as for ./launch/local.sh."""

GROUPS: dict[str, tuple[Check, ...]] = {
    "python": python.CHECKS,
    "GPUs": gpu.CHECKS,
    "torch": torch_view.CHECKS,
    "libraries": (*libraries.CHECKS, *images.CHECKS),
    "limits": limits.CHECKS,
    "storage": storage.CHECKS,
    "network": network.CHECKS,
    "cluster": cluster.CHECKS,
    "project": project.CHECKS,
}
# Seconds; torch alone takes a minute to import from a busy disk.
CHECK_LIMIT, IMPORT_LIMIT = 40.0, 200.0
IMPORTING = (*torch_view.CHECKS, *libraries.CHECKS, *images.CHECKS, *project.CHECKS)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"refused: {message}; --help shows examples\n")
        sys.exit(REFUSED)


def examine(host: Host, groups: dict[str, tuple[Check, ...]] = GROUPS) -> Iterable[Finding]:
    """Findings of every check; one that itself fails becomes a finding."""
    for group, checks in groups.items():
        for check in checks:
            for finding in _run(check, host):
                finding.group = group
                yield finding


def _run(check: Check, host: Host) -> list[Finding]:
    found: list[Finding] = []

    def work() -> None:
        try:
            found.extend(check(host))
        except Exception as error:
            text = f"this check failed itself: {type(error).__name__}: {error}"
            found.append(Finding("warning", check.__name__, text, "please report it"))

    # A thread, because a file system that has gone stops whoever asks it, for ever.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    limit = IMPORT_LIMIT if host.imports and check in IMPORTING else CHECK_LIMIT
    thread.join(limit)
    if not thread.is_alive():
        return found
    cure = "a disk that hangs? try ls and df on the folders above; or look at dmesg"
    text = f"did not end within {limit:g} s"
    return [*found, Finding("error", check.__name__, text, cure)]


def main(words: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit code."""
    options, flags = _parser().parse_known_args(words)
    if flags and options.recipe is None:
        _parser().error(f"{' '.join(flags)}: unknown, and without --recipe no flag of a run")
    host = Host(run_dir=options.run_dir, recipe=options.recipe, imports=not options.quick)
    try:
        if options.recipe is not None:
            host.values = _recipe(options.recipe, flags)
        step = nodes.Step.of(host, options.port) if options.multi_node else None
    except ValueError as error:
        _parser().error(str(error))
    smoke = options.collectives or not options.quick
    if step is not None:
        return _multi_node(host, step, options, smoke)
    findings = list(examine(host))
    if smoke:
        findings += collectives.check(host, options.time_limit)
    return _show(findings, host, options)


def _recipe(name: str, flags: list[str]) -> dict[str, object]:
    try:
        from moa_megatron import outline
    except ImportError as error:
        raise ValueError(f"--recipe needs PyYAML ({error}): ./launch/setup.sh") from error
    return outline.outline(name, flags)


def _multi_node(host: Host, step: nodes.Step, options: argparse.Namespace, smoke: bool) -> int:
    # One look at torch for each node is enough; the others have the same files.
    host.imports = host.imports and step.local == 0
    findings = list(examine(host))
    wait, limit = options.wait, options.time_limit
    try:
        if step.rank:
            nodes.member(host, step, findings, wait, limit)
            return 0
        reports, together = nodes.lead(host, step, findings, wait, limit, smoke)
    except OSError as error:
        where = f"{step.address}:{step.port}"
        doing = "cannot reach rank 0 at" if step.rank else "cannot listen at"
        cure = "--port names another port; firewall, interfaces"
        sys.stderr.write(f"rank {step.rank} on {host.name()} {doing} {where}: {error}; {cure}\n")
        return 1
    return _show([*report.merged(reports, together), *together], host, options, reports)


def _show(
    findings: list[Finding],
    host: Host,
    options: argparse.Namespace,
    reports: Sequence[dict[str, object]] = (),
) -> int:
    if options.json:
        print(json.dumps(report.record(findings, host.name(), reports), indent=1))
    else:
        print(report.text(findings, colour=sys.stdout.isatty(), quiet=options.quiet))
    return int(report.failed(findings))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tools/doctor.py",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="import and start nothing")
    add("--quiet", action="store_true", help="leave out what is in order")
    add("--json", action="store_true", help="one JSON object")
    add("--run-dir", type=Path, default=ROOT / "runs", help="where runs will write (runs/)")
    add("--recipe", metavar="NAME", help="check what this recipe, with its flags, needs")
    add("--collectives", action="store_true", help="the smoke test, also with --quick")
    add("--multi-node", action="store_true", help="under srun: all nodes, and the differences")
    add("--time-limit", type=_seconds, default=20.0, help="seconds for the smoke test (20)")
    add("--wait", type=_seconds, default=180.0, help="seconds rank 0 waits for others (180)")
    add("--port", type=int, help="where rank 0 listens with --multi-node (by the job's number)")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 3600 seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
