"""GPUs as the driver shows them; torch's own view is in libraries.py."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator

from tools.doctor_checks.host import Finding, Host, size

# Fields of every driver since 2021; one unknown to a driver makes the whole question fail.
FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "compute_cap",
    "ecc.errors.uncorrected.volatile.total",
    "persistence_mode",
    "mig.mode.current",
)
QUERY = ("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
APPS = (
    "nvidia-smi",
    "--query-compute-apps=pid,process_name,used_memory",
    "--format=csv,noheader,nounits",
)
_BUSY_MIB = 1024


def devices(host: Host) -> list[dict[str, str]]:
    """One record for each GPU; empty without a driver."""
    text = host.ask(*QUERY, limit=30) or ""
    rows = [[word.strip() for word in line.split(",")] for line in text.splitlines()]
    return [dict(zip(FIELDS, row)) for row in rows if len(row) == len(FIELDS)]


def driver_cuda(host: Host) -> tuple[int, int] | None:
    """Newest CUDA that the driver serves."""
    if "driver_cuda" in host.facts or host.answers is not None:
        return host.facts.get("driver_cuda")
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def capability(record: dict[str, str]) -> tuple[int, int]:
    """(9, 0) of "9.0"; (0, 0) where the driver does not say."""
    match = re.fullmatch(r"(\d+)\.(\d+)", record["compute_cap"])
    return (int(match[1]), int(match[2])) if match else (0, 0)


def driver(host: Host) -> Iterator[Finding]:
    """Driver and devices are there, and of one kind."""
    found = devices(host)
    if not found:
        yield from _without(host)
        return
    versions = sorted({record["driver_version"] for record in found})
    newest = driver_cuda(host)
    text = f"{', '.join(versions)}, CUDA up to {'.'.join(map(str, newest)) if newest else '?'}"
    yield Finding("ok", "driver", text, value=versions[0])
    kinds = sorted({f"{r['name']}, {_memory(r)}, capability {r['compute_cap']}" for r in found})
    value = f"{len(found)} x {' | '.join(kinds)}"
    if len(kinds) > 1:
        cure = "set CUDA_VISIBLE_DEVICES to GPUs of one kind: the slowest decides"
        yield Finding("warning", "GPUs", value, cure, value)
    else:
        yield Finding("ok", "GPUs", value, value=value)
    visible = host.env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and len([v for v in visible.split(",") if v.strip()]) < len(found):
        text = f"is {visible!r}: not all of {len(found)} GPUs are used"
        yield Finding("note", "CUDA_VISIBLE_DEVICES", text, "unset it, unless it is meant")


def _without(host: Host) -> Iterator[Finding]:
    cards = [n for n in host.names("/proc/driver/nvidia/gpus") if n]
    if cards or host.names("/dev/nvidia0") or host.has("nvidia-smi"):
        yield Finding(
            "error",
            "GPUs",
            "there is a driver or a device, but nvidia-smi shows no GPU",
            "run nvidia-smi; in a container start it with --gpus all (docker), --nv (Apptainer)",
        )
    elif host.env.get("SLURM_GPUS_ON_NODE", "0").isdigit() and int(
        host.env.get("SLURM_GPUS_ON_NODE", "0")
    ):
        text = f"Slurm gave {host.env['SLURM_GPUS_ON_NODE']}, but nvidia-smi is not here"
        yield Finding("warning", "GPUs", text, "a container needs --gpus all or --nv", "none")
    else:
        yield Finding("note", "GPUs", "none: training runs on the CPU", value="none")


def health(host: Host) -> Iterator[Finding]:
    """Memory errors, settings, and memory that others hold."""
    found = devices(host)
    for record in found:
        name = f"GPU {record['index']}"
        errors = record["ecc.errors.uncorrected.volatile.total"]
        if errors.isdigit() and int(errors):
            text = f"{errors} uncorrected memory errors since the driver was loaded"
            yield Finding(
                "error", name, text, "exclude the node and have the GPU reset or replaced"
            )
        if record["mig.mode.current"] == "Enabled":
            text = "is split by MIG: NCCL cannot connect its parts"
            yield Finding(
                "warning", name, text, "nvidia-smi -i N -mig 0 (root), or one rank for each part"
            )
    lazy = [r["index"] for r in found if r["persistence_mode"] == "Disabled"]
    if lazy:
        text = f"off on GPU {', '.join(lazy)}: every start waits for the driver to load"
        yield Finding("note", "persistence", text, "nvidia-smi -pm 1 (root)")
    held = [r for r in found if r["memory.used"].isdigit() and int(r["memory.used"]) > _BUSY_MIB]
    if held:
        apps = (host.ask(*APPS, limit=30) or "").strip().splitlines()
        whose = "; ".join(", ".join(w.strip() for w in app.split(",")) + " MiB" for app in apps[:6])
        text = ", ".join(f"GPU {r['index']} {int(r['memory.used']):,} MiB" for r in held)
        text += f" held by {whose}" if whose else " held by processes that are not visible here"
        yield Finding("warning", "GPU memory", text, "end them, or wait: nvidia-smi shows them")
    elif found:
        yield Finding("ok", "GPU memory", "nobody else holds any")


def precision(host: Host) -> Iterator[Finding]:
    """FP8 by compute capability, as Transformer Engine decides."""
    found = devices(host)
    if not found:
        return
    least = min(map(capability, found))
    can = [name for name, serves in precisions(least).items() if serves]
    cannot = [name for name, serves in precisions(least).items() if not serves]
    text = f"{', '.join(can)}" + (f"; not {', '.join(cannot)}" if cannot else "")
    yield Finding("ok" if "bf16" in can else "warning", "precision", text, value=text)


def precisions(least: tuple[int, int]) -> dict[str, bool]:
    """What devices of this capability compute in."""
    return {
        "bf16": least >= (8, 0),
        "FP8": least >= (8, 9),
        # Transformer Engine leaves the consumer cards, 12.x, out.
        "MXFP8": (10, 0) <= least < (12, 0),
    }


def topology(host: Host) -> Iterator[Finding]:
    """How the GPUs of this node reach each other."""
    count = len(devices(host))
    text = host.ask("nvidia-smi", "topo", "-m", limit=30)
    if count < 2 or text is None:
        return
    links: dict[str, int] = {}
    for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines():
        row = re.match(r"GPU(\d+)\s+(.*)", line.strip())
        # The line of headings begins like that of a GPU.
        if row and row[2].split()[int(row[1])] == "X":
            for word in row[2].split()[:count][int(row[1]) + 1 :]:
                kind = "NVLink" if word.startswith("NV") else word
                links[kind] = links.get(kind, 0) + 1
    said = ", ".join(f"{number} pairs by {kind}" for kind, number in sorted(links.items()))
    mixed = "NVLink" in links and len(links) > 1
    if not links:
        return
    if mixed:
        cure = "keep tensor parallelism inside GPUs that NVLink joins"
        yield Finding("warning", "links", f"{said}: not every pair has NVLink", cure, said)
    elif "NVLink" in links:
        yield Finding("ok", "links", said, value=said)
    else:
        text = f"{said}: no NVLink; tensor and expert parallelism will be slow"
        yield Finding("note", "links", text, "prefer data parallelism on this node", said)


def _memory(record: dict[str, str]) -> str:
    text = record["memory.total"]
    return size(int(text) << 20) if text.isdigit() else text


CHECKS = (driver, health, precision, topology)
