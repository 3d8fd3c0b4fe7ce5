"""Findings as text, grouped, or as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from tools.doctor_checks.host import LEVELS, Finding

_COLOURS = {"ok": "32", "note": "36", "warning": "33", "error": "31;1"}
_MARKS = {"ok": "ok", "note": "note", "warning": "WARNING", "error": "ERROR"}
SCHEMA = 1


def text(findings: Iterable[Finding], colour: bool = False, quiet: bool = False) -> str:
    """Lines by group; ``quiet`` leaves out what is in order."""
    listed, group = list(findings), None
    lines: list[str] = []
    shown = [f for f in listed if not (quiet and f.level == "ok")]
    width = max((len(f.check) for f in shown), default=0)
    for finding in shown:
        if finding.group != group:
            group = finding.group
            lines += ["", _paint(group, "1", colour)] if lines else [_paint(group, "1", colour)]
        mark = _paint(f"{_MARKS[finding.level]:>7}", _COLOURS[finding.level], colour)
        lines.append(f"{mark}  {finding.check:{width}}  {finding.message}")
        if finding.cure and finding.level != "ok":
            lines.append(f"{'':>7}  {'':{width}}  -> {finding.cure}")
    return "\n".join([*lines, "", _summary(listed)])


def record(
    findings: Sequence[Finding], host: str, nodes: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The same for programs."""
    said: dict[str, Any] = {
        "schema": SCHEMA,
        "host": host,
        "counts": counts(findings),
        "exit_code": int(failed(findings)),
        "findings": [asdict(finding) for finding in findings],
    }
    if nodes:
        said["nodes"] = list(nodes)
    return said


def failed(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """Findings of each level."""
    levels = [finding.level for finding in findings]
    return {level: levels.count(level) for level in LEVELS}


def merged(reports: Sequence[dict[str, Any]], together: Iterable[Finding]) -> list[Finding]:
    """Findings of all tasks, each once: in order on rank 0's host, others wherever they are."""
    # Each node alone could only guess whether the others see its folder.
    seen = {f.check for f in together if f.level == "ok"}
    where: dict[tuple[str, ...], list[str]] = {}
    kept: dict[tuple[str, ...], Finding] = {}
    hosts = sorted({report["host"] for report in reports})
    for report in sorted(reports, key=lambda r: r["rank"]):
        for fields in report["findings"]:
            finding = Finding(**fields)
            if finding.level == "ok" and report["rank"]:
                continue
            if finding.level == "warning" and finding.check in seen:
                continue
            key = (finding.group, finding.check, finding.level, finding.message)
            kept.setdefault(key, finding)
            if report["host"] not in where.setdefault(key, []):
                where[key].append(report["host"])
    for place, finding in kept.items():
        if finding.level != "ok" and len(hosts) > 1:
            names = where[place]
            whose = "all nodes" if len(names) == len(hosts) else ", ".join(names[:6])
            finding.message = f"{finding.message} [{whose}]"
    order = list(dict.fromkeys(finding.group for finding in kept.values()))
    return sorted(kept.values(), key=lambda finding: order.index(finding.group))


def _summary(findings: Sequence[Finding]) -> str:
    number = counts(findings)
    parts = [
        f"{number[level]} {level}{'s' if level != 'ok' and number[level] != 1 else ''}"
        for level in reversed(LEVELS)
    ]
    verdict = "not ready" if number["error"] else "ready"
    return f"{verdict}: {', '.join(parts)}"


def _paint(words: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{words}\x1b[0m" if colour else words
