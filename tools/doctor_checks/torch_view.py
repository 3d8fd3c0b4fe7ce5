"""torch as a process of its own sees it: builds, devices, libraries it has really loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from moa_megatron import packages
from tools.doctor_checks import gpu
from tools.doctor_checks.host import Finding, Host, attempt

_LIMIT = 90.0
_CODE = """
import json, re, torch
cuda = torch.cuda
on = cuda.is_available()
seen = {"version": torch.__version__, "cuda": torch.version.cuda, "available": on,
        "arch": cuda.get_arch_list() if on else [], "count": cuda.device_count() if on else 0,
        "gloo": torch.distributed.is_gloo_available(), "nccl": None, "cudnn": None}
if torch.version.cuda and torch.distributed.is_nccl_available():
    seen["nccl"] = ".".join(map(str, cuda.nccl.version()))
if on:
    seen["cudnn"] = torch.backends.cudnn.version()
    count = seen["count"]
    seen["peers"] = [[i, j] for i in range(count) for j in range(count)
                     if i != j and not cuda.can_device_access_peer(i, j)]
    x = torch.ones(256, 256, device="cuda")
    seen["product"] = float((x @ x).sum())
with open("/proc/self/maps") as maps:
    found = set(re.findall(r"(/\\S+/lib(?:cudnn|nccl)[^/\\s]*\\.so[.\\d]*)", maps.read()))
seen["libraries"] = sorted(found)
print("\\n" + json.dumps(seen))
"""


def torch(host: Host) -> Iterator[Finding]:
    """Installed, of the project's version, built for this driver, and working."""
    found = version_of(host, "torch")
    if found is None and not host.facts.get("torch_module", packages.importable("torch")):
        text = "not installed: nothing below needs it, training does"
        yield Finding(
            "error", "torch", text, "./launch/setup.sh, or use NVIDIA's PyTorch image", "none"
        )
        return
    if not host.imports:
        yield Finding("ok", "torch", f"{found} (not imported: --quick)", value=found)
        return
    seen = view(host)
    if "error" in seen:
        cure = "./launch/setup.sh; in a container the image's torch was replaced or shadowed"
        yield Finding("error", "torch", f"{found} does not import: {seen['error']}", cure, found)
        return
    yield from _build(host, seen)
    yield from _devices(seen)
    yield from _copies(seen)


def view(host: Host) -> dict[str, Any]:
    """What torch says, asked once; ``error`` with the last line where it says nothing."""
    if "torch" not in host.facts:
        probe = attempt(_CODE, _LIMIT)
        try:
            seen = json.loads(probe.output.strip().splitlines()[-1]) if probe.ok else None
        except (ValueError, IndexError):
            seen = None
        host.facts["torch"] = seen or {"error": probe.last_line}
    return dict(host.facts["torch"])


def version_of(host: Host, distribution: str) -> str | None:
    """As installed, or as a test has it."""
    given = host.facts.get("distributions")
    return packages.version(distribution) if given is None else given.get(distribution)


def _build(host: Host, seen: dict[str, Any]) -> Iterator[Finding]:
    text = f"{seen['version']}, CUDA {seen['cuda'] or 'none'}"
    newest = gpu.driver_cuda(host)
    present = bool(gpu.devices(host))
    major = int(str(seen["cuda"]).split(".")[0]) if seen["cuda"] else None
    if present and major is None:
        cure = "install torch's CUDA build: ./launch/setup.sh"
        yield Finding("error", "torch", f"{text}: a CPU build beside GPUs", cure, text)
    elif newest and major and major > newest[0]:
        text += f"; the driver serves CUDA {newest[0]}.{newest[1]} at most"
        cure = "a newer driver, NVIDIA's cuda-compat package, or a torch for that CUDA"
        yield Finding("error", "torch", text, cure, seen["version"])
    elif present and not seen["available"]:
        cure = "CUDA_VISIBLE_DEVICES? driver and torch of the same CUDA? see nvidia-smi, dmesg"
        yield Finding("error", "torch", f"{text}: sees no GPU, nvidia-smi does", cure, text)
    else:
        yield Finding("ok", "torch", text, value=seen["version"])
    if not seen["gloo"]:
        yield Finding("warning", "gloo", "not in this torch", "CPU runs and checkpoints need it")
    if seen["nccl"]:
        yield Finding("ok", "NCCL", seen["nccl"], value=seen["nccl"])
    elif present:
        cure = "install torch's CUDA build: ./launch/setup.sh"
        yield Finding("error", "NCCL", "not in this torch: GPUs cannot work together", cure)


def _devices(seen: dict[str, Any]) -> Iterator[Finding]:
    if not seen["available"]:
        return
    if seen.get("product") != 256.0**3:
        text = f"a product of ones on GPU 0 is {seen.get('product')}, not {256.0**3}"
        yield Finding("error", "CUDA", text, "do not train here; look at dmesg for Xid errors")
    else:
        yield Finding(
            "ok", "CUDA", f"{seen['count']} GPUs, a product computed; cuDNN {seen['cudnn']}"
        )
    if seen.get("peers"):
        pairs = ", ".join(f"{a}-{b}" for a, b in seen["peers"][:4])
        text = f"{len(seen['peers'])} pairs of GPUs cannot reach each other's memory ({pairs})"
        yield Finding("note", "P2P", text, "NCCL goes through host memory: check ACS, IOMMU, topo")


def _copies(seen: dict[str, Any]) -> Iterator[Finding]:
    """Two copies of one library in a process fail in ways that name neither."""
    for name in ("libcudnn.so", "libnccl.so"):
        copies = [path for path in seen["libraries"] if path.rsplit("/", 1)[-1].startswith(name)]
        if len(copies) > 1:
            cure = "unset LD_PRELOAD and LD_LIBRARY_PATH, or pip uninstall the one too many"
            yield Finding(
                "error", name[3:-3], f"loaded {len(copies)} times: {', '.join(copies)}", cure
            )


CHECKS = (torch,)
