"""Made-up machines for the checks of tools/doctor.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.doctor_checks import gpu
from tools.doctor_checks.host import Check, Finding, Host

H100 = "NVIDIA H100 80GB HBM3"


def machine(
    root: Path,
    files: dict[str, str] | None = None,
    env: dict[str, str] | None = None,
    answers: dict[str, str] | None = None,
    **facts: Any,
) -> Host:
    """A host of nothing but these files, variables, answers of commands and facts."""
    for name, text in (files or {}).items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    host = Host(root=root, env=env or {}, answers=answers or {}, imports=False)
    host.facts.update(facts)
    return host


def gpus(count: int = 8, **changed: str) -> dict[str, str]:
    """What nvidia-smi says of healthy H100s, but for ``changed`` (dots as ``_``) on the last."""
    rows = []
    for index in range(count):
        record = dict(
            zip(
                gpu.FIELDS,
                (str(index), H100, "580.95", "81559", "4", "9.0", "0", "Enabled", "Disabled"),
            )
        )
        if index == count - 1:
            names = {name.replace(".", "_"): name for name in gpu.FIELDS}
            record |= {names[key]: value for key, value in changed.items()}
        rows.append(", ".join(record.values()))
    return {" ".join(gpu.QUERY): "\n".join(rows)}


def found(check: Check, host: Host) -> dict[str, Finding]:
    """Findings by name; the worst one where a name comes twice."""
    worst: dict[str, Finding] = {}
    order = ("ok", "note", "warning", "error")
    for finding in check(host):
        old = worst.get(finding.check)
        if old is None or order.index(finding.level) > order.index(old.level):
            worst[finding.check] = finding
    return worst


def levels(check: Check, host: Host) -> dict[str, str]:
    """Name -> level."""
    return {name: finding.level for name, finding in found(check, host).items()}
