"""The project itself: its revision, its environment, its patches, and a recipe's needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moa_megatron import packages
from tools.doctor_checks import gpu
from tools.doctor_checks.host import Finding, Host, attempt

_LIMIT = 120.0
_CODE = """
from moa_megatron import host
host.install()
from moa_megatron import patches
placed = patches.apply()
left = [n for n, p in patches.PATCHES.items() if p.applicable() and n not in placed]
print("\\nplaced", len(placed), "left", " ".join(left))
"""


def revision(host: Host) -> Iterator[Finding]:
    """Which code this is; nodes of a job must agree."""
    folder = str(host.project)
    commit = (host.ask("git", "-C", folder, "rev-parse", "--short=12", "HEAD") or "").strip()
    if not commit:
        record = host.project / "BUILD_INFO"
        text = f"an image's ({record})" if record.is_file() else "unknown: no git here"
        yield Finding("ok" if record.is_file() else "note", "revision", text)
        return
    changed = (host.ask("git", "-C", folder, "status", "--porcelain") or "").splitlines()
    if changed:
        text = f"{commit} with {len(changed)} changed files"
        yield Finding("note", "revision", text, "submit.py keeps git.diff; else commit", text)
    else:
        yield Finding("ok", "revision", commit, value=commit)


def environment(host: Host) -> Iterator[Finding]:
    """``launch/setup.sh`` leaves a copy of the lock that it has installed."""
    venv = host.project / ".venv"
    if not venv.exists():
        text = "no .venv: this interpreter's own packages serve (as in a container)"
        yield Finding("note", "environment", text, "./launch/setup.sh, outside of containers")
        return
    own = Path(host.facts.get("prefix", sys.prefix)).resolve()
    if own != venv.resolve():
        text = f"this is {own}, not the project's .venv"
        yield Finding("warning", "environment", text, "run it as .venv/bin/python tools/doctor.py")
    stamp, lock = venv / ".moa-lock", host.project / "uv.lock"
    if not stamp.is_file():
        text = "nothing says which uv.lock .venv was installed from"
        yield Finding("note", "environment", text, "./launch/setup.sh")
    elif stamp.read_bytes() != lock.read_bytes():
        text = ".venv was installed from another uv.lock"
        cure = "./launch/setup.sh"
        cure += f" in {venv.resolve().parent}, whose .venv this is" if venv.is_symlink() else ""
        yield Finding("warning", "environment", text, cure)
    else:
        yield Finding("ok", "environment", ".venv is what uv.lock says")


def patches(host: Host) -> Iterator[Finding]:
    """Megatron imports, and each upstream fix finds the source it was written against."""
    if not host.imports or not packages.importable("torch"):
        return
    if not packages.importable("megatron.core"):
        yield Finding("error", "Megatron", "not installed", "./launch/setup.sh", "none")
        return
    probe = attempt(_CODE, _LIMIT)
    last = probe.output.strip().splitlines()[-1:] or [""]
    yield patched(probe.ok, last[0], probe.last_line)


def patched(ran: bool, said: str, last_line: str) -> Finding:
    """The finding of what the process said."""
    if not ran or not said.startswith("placed "):
        text = f"Megatron or the patches do not import: {last_line}"
        return Finding("error", "patches", text, "./launch/setup.sh")
    count, left = said.removeprefix("placed ").split(" left", 1)
    if left.strip():
        text = f"not applied, for upstream differs: {left.strip().replace(' ', ', ')}"
        return Finding(
            "error", "patches", text, "install the pinned megatron-core; patches/README.md"
        )
    return Finding("ok", "patches", f"Megatron imports, {count} patches in place", value=count)


def recipe(host: Host) -> Iterator[Finding]:
    """What a recipe with its flags asks of this machine."""
    if host.recipe is None:
        return
    from moa_megatron import outline  # needs PyYAML, as does every use of a recipe

    yield from _connections(host, outline.device_connections(host.values), host.values)
    yield from _precision(host, host.values)


def _connections(host: Host, wanted: int | None, values: dict[str, Any]) -> Iterator[Finding]:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    text = host.env.get(name)
    fsdp = values.get("use_megatron_fsdp") or values.get("use_torch_fsdp2")
    if text is None:
        said = f"not set; the launchers set {wanted}" if wanted else "not set, and not needed"
        yield Finding("ok", name, f"{said} for {host.recipe}")
    elif wanted is not None and text != str(wanted):
        # Megatron asserts 1 before Blackwell; 32 is advice.
        blackwell = any(gpu.capability(r) >= (10, 0) for r in gpu.devices(host))
        level = "error" if wanted == 1 and not blackwell else "warning"
        said = f"is {text}, but {host.recipe} with these flags wants {wanted}"
        yield Finding(level, name, said, f"unset {name}: the launchers compute it")
    elif fsdp and text == "1":
        said = "is 1, which FSDP must not have"
        yield Finding("error", name, said, f"unset {name}")
    elif wanted is None:
        said = f"is {text}; {host.recipe} with these flags needs none"
        yield Finding("note", name, said, f"unset {name}: 1 keeps kernels from overlapping")
    else:
        yield Finding("ok", name, f"{text}, as {host.recipe} wants")


def _precision(host: Host, values: dict[str, Any]) -> Iterator[Finding]:
    found = gpu.devices(host)
    if not found or not (values.get("fp8_format") or values.get("fp8")):
        return
    serves = gpu.precisions(min(map(gpu.capability, found)))
    wanted = "MXFP8" if str(values.get("fp8_recipe", "")).lower() == "mxfp8" else "FP8"
    if serves[wanted]:
        yield Finding("ok", "recipe", f"{wanted} on {found[0]['name']}")
    else:
        text = f"{host.recipe} with these flags computes in {wanted}, {found[0]['name']} cannot"
        yield Finding("error", "recipe", text, "leave --fp8-format out, or use newer GPUs")


CHECKS = (recipe, revision, environment, patches)
