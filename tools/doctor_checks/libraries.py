"""What stands beside torch: Transformer Engine, Apex, Megatron, compilers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moa_megatron import packages
from tools.doctor_checks import gpu
from tools.doctor_checks.host import Finding, Host, attempt
from tools.doctor_checks.torch_view import version_of

_IMPORT_LIMIT = 90.0
_LOCAL = "or use --transformer-impl local"


def names(host: Host) -> dict[str, str]:
    """Canonical name -> version of every distribution."""
    if "distributions" in host.facts:
        return dict(host.facts["distributions"])
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        found.setdefault(name, distribution.version)  # the first on the path is in use
    return found


def copies(host: Host) -> Iterator[Finding]:
    """pip's CUDA libraries come before the system's, which an image's torch was built against."""
    found = names(host)
    for library in ("cudnn", "nccl"):
        brought = sorted(n for n in found if re.fullmatch(rf"nvidia-{library}(-cu\d+)?", n))
        wanted = _torch_wants(host, f"nvidia-{library}")
        system = f"lib{library}.so" in (host.ask("ldconfig", "-p") or "")
        cure = f"pip uninstall {' '.join(brought)}"
        if len(brought) > 1:
            text = f"{', '.join(brought)}: torch may load the wrong one"
            yield Finding("warning", library, text, f"keep what torch requires; {cure}")
        elif brought and not wanted and "torch" in found:
            text = f"{brought[0]} {found[brought[0]]} although this torch brings or expects its own"
            text += "; it shadows the system's" if system else ""
            yield Finding("warning", library, text, cure)
        elif brought:
            text = f"{brought[0]} {found[brought[0]]}"
            yield Finding("ok", library, text, value=text)


def _torch_wants(host: Host, prefix: str) -> bool:
    requires = host.facts.get("torch_requires")
    if requires is None:
        try:
            requires = importlib.metadata.requires("torch") or []
        except importlib.metadata.PackageNotFoundError:
            requires = []
    return any(line.startswith(prefix) for line in requires)


def transformer_engine(host: Host) -> Iterator[Finding]:
    """Installed with its PyTorch part, in the project's range, and built for this torch."""
    version = version_of(host, "transformer-engine")
    folder = host.facts.get("engine_folder", _folder("transformer_engine"))
    wanted = host.values.get("transformer_impl") == "transformer_engine"
    level = "error" if wanted else "warning"
    check = "Transformer Engine"
    if version is None and folder is None:
        text = "not installed: Megatron's local modules serve, without FP8"
        cure = f"{packages.TE_INSTALL}, {_LOCAL}" if gpu.devices(host) or level == "error" else ""
        yield Finding(level if level == "error" else "note", check, text, cure, "none")
        return
    if folder is None:
        text = f"{version} is the empty meta package: it has no module"
        yield Finding(level, check, text, f"{packages.TE_INSTALL}, {_LOCAL}", version)
        return
    extension = [*Path(folder).rglob("transformer_engine_torch*.so")]
    extension += [*Path(folder).parent.glob("transformer_engine_torch*")]
    if not (Path(folder) / "pytorch").exists() or not extension:
        text = f"{version} is there without its PyTorch part"
        yield Finding(level, check, text, f"{packages.TE_INSTALL}, {_LOCAL}", version)
        return
    problem = packages.engine_version_problem(version or "0")
    if problem is not None:
        yield Finding(level, check, problem, _LOCAL[3:], version)
    elif not host.imports or not gpu.devices(host):
        text = f"{version} (not imported: {'needs a GPU' if host.imports else '--quick'})"
        yield Finding("ok", check, text, value=version)
    else:
        yield _imports(check, "transformer_engine.pytorch", version, level)


def _imports(check: str, module: str, version: str | None, level: str) -> Finding:
    probe = attempt(f"import {module}", _IMPORT_LIMIT)
    if probe.ok:
        text = f"{version}, imported in {probe.seconds:.0f} s"
        return Finding("ok", check, text, value=version)
    cure = "build it for this torch: pip install --no-build-isolation --force-reinstall --no-deps"
    return Finding(level, check, f"{version} does not import: {probe.last_line}", cure, version)


def apex(host: Host) -> Iterator[Finding]:
    """NVIDIA's, or the web toolkit of the same name, or none."""
    problem = packages.apex_problem()
    if problem is not None:
        text, _, cure = problem.partition(": ")
        yield Finding("error", "apex", text, cure)
    elif packages.importable("apex"):
        yield Finding("ok", "apex", "NVIDIA's", value=version_of(host, "apex") or "present")
    else:
        yield Finding("ok", "apex", "not installed, and not needed", value="none")


def flash_attention(host: Host) -> Iterator[Finding]:
    """flash-attn breaks when torch changes."""
    found = names(host)
    flash = next((n for n in found if n.startswith("flash-attn")), None)
    if flash is not None and host.imports and gpu.devices(host):
        yield _imports("flash-attn", "flash_attn", found[flash], "warning")
    elif flash is not None:
        yield Finding("ok", "flash-attn", f"{found[flash]} (not imported)", value=found[flash])


def megatron(host: Host) -> Iterator[Finding]:
    """The versions that pyproject.toml names; the patches are written against one."""
    found = names(host)
    for name, wanted in pins(host).items():
        version = found.get(name)
        cure = f"./launch/setup.sh, or pip install '{name}{wanted}'"
        if version is None:
            if name != "torch":  # torch_view has said so
                yield Finding("error", name, "not installed", cure, "none")
        elif fits(version, wanted):
            if name != "torch":
                yield Finding("ok", name, version, value=version)
        else:
            level = "warning" if name == "torch" else "error"  # images bring their own torch
            yield Finding(
                level, name, f"{version}; the project is tested with {wanted}", cure, version
            )
    if "megatron-core" in found and "distributions" not in host.facts:
        problem = packages.helpers_problem()
        if problem is not None:
            text, _, cure = problem.partition(": ")
            yield Finding("error", "data helpers", text, cure)


def pins(host: Host) -> dict[str, str]:
    """Exact requirements of pyproject.toml: name -> ``==version``."""
    text = (host.project / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.split("dependencies = [", 1)[1].split("]", 1)[0]
    return dict(re.findall(r'"([\w.-]+)(==[\w.*]+)"', listed))


def fits(version: str, wanted: str) -> bool:
    """``==1.2.*`` or ``==1.2.3``; a build's suffix (+cu130) does not count."""
    wanted = wanted.removeprefix("==")
    plain = version.split("+")[0]
    if wanted.endswith(".*"):
        return (plain + ".").startswith(wanted[:-1])
    return plain == wanted


def compilers(host: Host) -> Iterator[Finding]:
    """The C++ kernels of CPU runs are compiled; so is Triton's launcher, in C, on a GPU."""
    own = host.env.get("CXX")
    cpp = next((c for c in (own, "g++", "clang++") if c and host.has(c)), None)
    c = next((c for c in (host.env.get("CC"), "gcc", "cc", "clang") if c and host.has(c)), None)
    on_gpu = bool(gpu.devices(host))
    header = host.facts.get(
        "python_header", Path(sysconfig.get_path("include"), "Python.h").is_file()
    )
    if own and not host.has(own):
        text = f"$CXX names {own}, which is not there"
        yield Finding("warning", "CXX", text, "unset CXX, or install it")
    if on_gpu and c is None:
        text = "no C compiler: Triton cannot build its launchers"
        yield Finding(
            "error", "C compiler", text, "apt-get install gcc, or --moa-backend reference"
        )
    elif on_gpu and not header:
        text = "Python.h is missing: Triton cannot build its launchers"
        yield Finding("error", "Python headers", text, "apt-get install python3-dev")
    if cpp is not None:
        said = (host.ask(cpp, "--version") or cpp).splitlines()
        yield Finding("ok", "C++ compiler", said[0] if said else cpp)
    elif not on_gpu:
        text = "none: mixtures run in the slow reference on this CPU"
        yield Finding("warning", "C++ compiler", text, "apt-get install g++")
    if on_gpu and not host.has("nvcc"):
        text = "absent; only building Transformer Engine or flash-attn needs it"
        yield Finding("note", "nvcc", text)


def _folder(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return None if spec is None else next(iter(spec.submodule_search_locations or []), None)


CHECKS = (copies, transformer_engine, apex, flash_attention, megatron, compilers)
