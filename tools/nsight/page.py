"""The report as one HTML page that needs nothing else: tables, bars and a timeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from tools.nsight.classes import COLOURS
from tools.nsight.steps import METRICS, Rank, Step
from tools.nsight.text import ceiling, excluded, ms, short, visible
from tools.nsight.timeline import draw

_STYLE = """
:root{--ink:#1d2733;--soft:#5b6875;--line:#dfe4ea;--paper:#fff;--back:#f5f7f9}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:19px;margin:36px 0 8px}
h3{font-size:15px;margin:24px 0 6px}p{margin:6px 0}.soft{color:var(--soft)}
section,.cards div{background:var(--paper);border:1px solid var(--line);border-radius:8px}
section{padding:14px 18px;overflow-x:auto}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin:12px 0}
.cards div{padding:10px 16px;min-width:150px}
.cards b{display:block;font-size:22px;font-variant-numeric:tabular-nums}
.warning{border-left:4px solid #e4572e;padding-left:12px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{text-align:right;padding:3px 12px;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600}th:first-child,td:first-child{text-align:left}
td.text,th.text{text-align:left}tr.total td{font-weight:600;background:var(--back)}
.bar{display:flex;height:26px;border-radius:4px;overflow:hidden;margin:8px 0}
.key{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px}
.legend span{margin-right:16px;white-space:nowrap;font-size:13px}
svg{width:100%;min-width:900px;height:auto;display:block}
"""


def render(report: dict[str, Any], ranks: Sequence[Rank]) -> str:
    """The page, as XHTML-compatible HTML; ``ranks`` are those that the report was made of."""
    files = " · ".join(f"{f['file']} (nsys {f['nsys']})" for f in report["files"])
    body = [f"<h1>Device profile</h1><p class='soft'>{escape(files)}</p>"]
    body += [f"<p class='warning'>{escape(text)}</p>" for text in report["warnings"]]
    if report["survey"]:
        body.append(_survey(report["survey"]))
    body += [_rank(entry, rank) for entry, rank in zip(report["ranks"], ranks)]
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'/>"
        "<meta name='viewport' content='width=device-width'/><title>Device profile</title>"
        f"<style>{_STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def shown_step(rank: Rank) -> Step:
    """The counted step in the middle by wall time: the one to draw."""
    ordered = sorted(rank.counted, key=lambda step: step.metrics["wall"])
    return ordered[len(ordered) // 2]


def _rank(entry: dict[str, Any], rank: Rank) -> str:
    summary = entry["steps"]["summary"]
    wall = summary["wall"]["median"] or 1
    step = shown_step(rank)
    parts = [f"<h2>{escape(entry['rank'])} <span class='soft'>{escape(entry['gpu'])}</span></h2>"]
    parts.append(f"<p class='soft'>{escape(excluded(entry['steps']))}</p><div class='cards'>")
    for name, label in (
        ("wall", "step, median"),
        ("compute", "computing"),
        ("exposed", "exposed communication"),
        ("idle", "idle"),
        ("moa", "MoA's kernels"),
    ):
        value = summary[name]["median"]
        part = "" if name == "wall" else f" · {value / wall:.1%}"
        parts.append(f"<div><b>{ms(value)} ms</b><span class='soft'>{label}{part}</span></div>")
    parts.append(f"</div><h3>Step {escape(step.label)}</h3><section>{draw(rank, step)}</section>")
    parts.append(_shares(entry["classes"]))
    parts.append(_steps(entry["steps"]))
    parts.append(_tables(entry))
    parts.append("<h3>What could be gained at most</h3><section>")
    parts += [f"<p>{escape(line)}</p>" for line in ceiling(entry)]
    return "".join(parts) + "</section>"


def _shares(classes: Sequence[dict[str, Any]]) -> str:
    bars = "".join(
        f"<i style='width:{row['share']:.3%};background:{COLOURS[row['class']]}' "
        f"title='{escape(row['class'])} {row['share']:.1%}'></i>"
        for row in classes
    )
    legend = "".join(
        f"<span><i class='key' style='background:{COLOURS[row['class']]}'></i>"
        f"{escape(row['class'])} {row['share']:.1%} · {ms(row['time'])} ms</span>"
        for row in classes
    )
    return (
        "<h3>Device time by class, per step, summed over streams</h3>"
        f"<section><div class='bar'>{bars}</div><p class='legend'>{legend}</p></section>"
    )


def _steps(steps: dict[str, Any]) -> str:
    rows = [
        [row["step"] + ("" if row["counted"] else " (not counted)")]
        + [ms(row[name]) for name in METRICS]
        for row in steps["rows"]
    ]
    totals = [
        [key] + [ms(steps["summary"][name][key]) for name in METRICS]
        for key in ("min", "median", "max")
    ]
    names = "".join(f"<br/><b>{name}</b>: {escape(text)}" for name, text in METRICS.items())
    return (
        "<h3>Steps, ms</h3><section>"
        f"{_table(['step', *METRICS], rows, totals)}<p class='soft'>{names}</p></section>"
    )


def _tables(entry: dict[str, Any]) -> str:
    kernels = [
        [short(r["kernel"]), r["class"], r["count"], ms(r["time"]), f"{r['mean'] / 1e3:,.1f}"]
        + [f"{r['share']:.1%}"]
        for r in entry["kernels"]
    ]
    header = ["kernel", "class", "count", "ms per step", "mean us", "share"]
    parts = [f"<h3>Kernels</h3><section>{_table(header, kernels)}</section>"]
    regions = entry["moa"]["regions"]
    if regions:
        rows = [[n, ms(r["forward"]), ms(r["backward"])] for n, r in regions.items()]
        header = ["range, its own time", "forward, ms", "backward, ms"]
        parts.append(f"<h3>MoE and MoA</h3><section>{_table(header, rows)}</section>")
    if entry["ranges"]:
        rows = [
            ["\u2003" * (len(n["path"]) - 1) + short(n["path"][-1]), ms(n["time"]), n["count"]]
            for n in visible(entry["ranges"])
        ]
        header = ["range", "ms per step", "activities"]
        parts.append(f"<h3>Ranges</h3><section>{_table(header, rows)}</section>")
    if entry["copies"]:
        rows = [
            [r["kind"], r["memory"], r["count"], f"{r['bytes'] / 1e6:,.3f}", ms(r["time"])]
            for r in entry["copies"]
        ]
        header = ["copy", "memory", "count", "MB per step", "ms per step"]
        parts.append(f"<h3>Copies and fills</h3><section>{_table(header, rows)}</section>")
    return "".join(parts)


def _survey(survey: dict[str, Any]) -> str:
    names = ["wall", "compute", "communication", "exposed", "idle"]
    rows = [[r["rank"], *(ms(r[name]) for name in names)] for r in survey["ranks"]]
    return (
        f"<h2>Ranks, medians, ms</h2><section>{_table(['rank', *names], rows)}"
        f"<p><b>{escape(survey['verdict'])}</b></p></section>"
    )


def _table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], totals: Iterable[Sequence[Any]] = ()
) -> str:
    def line(cells: Sequence[Any], tag: str = "td", kind: str = "") -> str:
        words = "".join(
            f"<{tag}{' class=' + chr(39) + 'text' + chr(39) if header[i] in _WORDS else ''}>"
            f"{escape(str(cell))}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr{kind}>{words}</tr>"

    body = [line(header, "th"), *(line(row) for row in rows)]
    body += [line(row, kind=" class='total'") for row in totals]
    return f"<table>{''.join(body)}</table>"


_WORDS = {"class", "memory"}
