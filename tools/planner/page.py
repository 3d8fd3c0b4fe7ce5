"""The plan as text for people."""

from __future__ import annotations

from typing import Any

from moa_megatron.costs.gpus import Gpu

_PARTS = {
    "projections": "projections",
    "attention": "attention scores",
    "ffn": "FFN",
    "router": "router",
    "gates": "gates",
    "mixture": "mixture",
    "prediction": "prediction",
    "head": "output layer",
}


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f}"


def _duration(value: float) -> str:
    return f"{value / 24:.1f} d" if value >= 48 else f"{value:.1f} h"


def table(rows: list[list[str]]) -> list[str]:
    """Columns of equal width; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def show(plan: dict[str, Any], limit: int | None) -> list[str]:
    """The plan for people."""
    gpu, count, flops = plan["gpu"], plan["parameters"], plan["flops_per_token"]
    share = {name: flops[name] / flops["forward_all"] for name in flops if name in _PARTS}
    parts = ", ".join(f"{_PARTS[name]} {part:.1%}" for name, part in share.items() if part)
    lines = [
        f"{plan['recipe']} on {plan['gpus']} {gpu['title']}, {_gb(gpu['memory'])} GB each",
        f"  parameters   {count['total']:,}, active {count['active']:,}, gates {count['gates']:,} "
        f"({count['gates'] / count['total']:.2%})",
        f"  a token      {flops['model'] / 1e9:.3f} GFLOP in training; of the forward pass:",
        f"               {parts}",
        f"  the run      {plan['steps']:,} steps, {plan['tokens'] / 1e9:.2f} B tokens, "
        f"{plan['flops']:.2e} FLOP",
        f"  MFU          {plan['mfu']:.1%}, {plan['mfu_is']}"
        + ("; replace it by --mfu (docs/planning.md)" if plan["mfu_is"] == "assumed" else ""),
        "",
    ]
    rows = [
        ["layout", "micro", "recompute", "opt", "memory GB: states + activations = with margins"]
    ]
    priced = "cost" in plan["layouts"][0]
    rows[0] += ["step s*", "tokens/s", "run", "GPU-hours", *(["cost"] if priced else [])]
    for name, one in zip(plan["names"], plan["layouts"], strict=True):
        memory = one["memory"]
        states = memory["weights"] + memory["gradients"] + memory["optimizer"]
        acts = sum(value for key, value in memory.items() if key.startswith("activations_"))
        rows.append(
            [
                name,
                str(one["micro_batch_size"]),
                one["recompute"],
                "cut" if one["use_distributed_optimizer"] else "whole",
                f"{_gb(states)} + {_gb(acts)} = {_gb(memory['total'])}"
                + ("" if one["fits"] else " TOO MUCH"),
                f"{one['step_seconds']:.3g}",
                f"{one['tokens_per_second']:,.0f}",
                _duration(one["hours"]),
                f"{one['gpu_hours']:,.0f}",
                *([f"{one['cost']:,.0f}"] if priced else []),
            ]
        )
    lines += table(rows[: limit and limit + 1])
    lines.append("* from MFU alone: time of communication between GPUs is not modelled")
    if limit and len(rows) > limit + 1:
        lines.append(f"... and {len(rows) - limit - 1} more legal layouts (--all)")
    lines += ["", f"first choice: {plan['names'][0]}, {_reason(plan)}"]
    for name, one in list(zip(plan["names"], plan["layouts"], strict=True))[:limit]:
        lines += [f"advice against {name}: {text}" for text in one["advice"]]
    return [*lines, "", *(f"  {command}" for command in plan["commands"])]


def _reason(plan: dict[str, Any]) -> str:
    sizes, first = plan["layouts"][0]["layout"], plan["layouts"][0]
    model_ranks = sizes["tp"] * sizes["pp"] * sizes["cp"]
    if model_ranks == 1 and sizes["ep"] == 1:
        why = "it fits by data parallelism alone, which communicates least"
    elif model_ranks == 1:
        why = "the least that fits: experts are spread, all else is data parallel"
    else:
        why = "the least model parallelism that fits"
    if first["recompute"] in ("selective", "full"):
        why += f", with {first['recompute']} recomputation"
    return why


def show_list(rows: list[dict[str, Any]], gpu: Gpu) -> list[str]:
    """The list for people."""
    head = ["recipe", "parameters", "active", "gates", "tokens", "FLOP", "MFU", "GPU-days"]
    body = [
        [
            row["recipe"],
            *(f"{row[key]:,}" for key in ("total", "active", "gates")),
            f"{row['tokens'] / 1e9:.3g} B",
            f"{row['flops']:.2e}",
            f"{row['mfu']:.1%}",
            f"{row['gpu_days']:.3g}",
        ]
        for row in rows
    ]
    return [f"GPU-days on {gpu.title}", *table([head, *body])]
