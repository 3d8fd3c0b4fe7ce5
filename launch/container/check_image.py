"""What a base image brought must still be there, unchanged, after our packages went in.

    check_image.py record FILE     before: PyTorch, CUDA, Transformer Engine, Apex as they are
    check_image.py verify FILE     after: the same files, NVIDIA's Apex or none, Megatron complete
    check_image.py imports         every module of the project loads
    check_image.py info FILE KEY=VALUE...    FILE's record and the versions, as JSON

Standard library only: it runs in images where nothing of ours is installed. It imports neither
torch nor Transformer Engine, which loads the driver's libcuda and so fails where images are built.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

# Built against each other and against the image's CUDA: exchanging one breaks the others.
PROTECTED = re.compile(
    r"(torch|triton|pytorch-triton|transformer-engine|apex|flash-attn|nvidia|cuda|tensorrt)([-_].*)?"
    r"|torch(vision|audio|ao|data|text)"
)
# DALI and the codecs that it alone loads are no part of CUDA's toolkit: a base without DALI, which
# NVIDIA's are at times, gets them. nvJPEG is part of it, and found in /usr/local/cuda.
_DALI = "nvidia-dali-"
ADDABLE = re.compile(rf"{_DALI}.*|nvidia-(nvimgcodec|nvtiff|nvjpeg2k|libnvcomp)-.*")
# Where these are found must not change either: a copy earlier on the path would shadow them.
MODULES = ("torch", "transformer_engine", "apex", "triton", "flash_attn")
NAMED = (
    "torch",
    "transformer-engine",
    "apex",
    "triton",
    "flash-attn",
    "nvidia-dali-cuda130",
    "megatron-core",
)
HELPERS = "megatron/core/datasets"
_IMPORTS = """
import importlib, pkgutil
from moa_megatron import host
host.install(force=True)  # hides Transformer Engine and Apex, which need a driver
import moa_megatron
names = [module.name for module in pkgutil.walk_packages(moa_megatron.__path__, "moa_megatron.")]
for name in names:
    importlib.import_module(name)
print(len(names), "modules of moa_megatron import, from", moa_megatron.__path__[0])
"""


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def protected(name: str) -> bool:
    """Whether only the base image may bring the distribution ``name``."""
    return PROTECTED.fullmatch(canonical(name)) is not None


def only_of_base(name: str, installed: Iterable[str]) -> bool:
    """Whether only a base with torch and the ``installed`` distributions may bring ``name``."""
    if not protected(name):
        return False
    names = {canonical(other) for other in installed}
    whole = any(other.startswith(_DALI) for other in names)  # two DALIs overwrite each other
    return whole or canonical(name) in names or ADDABLE.fullmatch(canonical(name)) is None


def snapshot() -> dict[str, Any]:
    """The protected distributions and modules of this interpreter, by content."""
    found: dict[str, Any] = {}
    for distribution in metadata.distributions():
        name = canonical(distribution.metadata["Name"] or "")
        if protected(name) and name not in found:  # the first one on the path is the one in use
            found[name] = {
                "version": distribution.version,
                "location": str(distribution.locate_file("")),
                "sha256": _digest(_files(distribution)),
            }
    return {
        "python": platform.python_version(),
        "torch_from": "base" if "torch" in found or _origin("torch") else "lock",
        "distributions": found,
        "modules": {name: _origin(name) for name in MODULES},
    }


def problems(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed although only the base image may change it, each with its cure."""
    said = []
    if before["torch_from"] == "base":
        for name, old in before["distributions"].items():
            said += _changed(name, old, now["distributions"].get(name))
        for name in sorted(set(now["distributions"]) - set(before["distributions"])):
            if not only_of_base(name, before["distributions"]):
                continue
            version = now["distributions"][name]["version"]
            said.append(
                f"{name} {version} appeared, which the base image left out and whose libraries "
                "would shadow its own: install the package that wants it with pip's --no-deps"
            )
        for name, old_origin in before["modules"].items():
            origin = now["modules"][name]
            if old_origin is not None and origin != old_origin:
                said.append(
                    f"module {name} was {old_origin} and is {origin or 'gone'}: remove what shadows"
                    " it from the path"
                )
    elif "torch" not in now["distributions"]:
        said.append("torch is neither in the base image nor installed from uv.lock: install it")
    return [*said, *filter(None, [wrong_apex(), missing_helpers()])]


def wrong_apex() -> str | None:
    """The package index has another project of that name; Megatron takes either for NVIDIA's."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return None
    return (
        f"the package apex in {folders[0] if folders else spec.origin} is not NVIDIA's Apex, but a "
        "web toolkit of the same name: pip uninstall apex in the base image (NVIDIA's comes with "
        "its PyTorch images; MoA runs without it too)"
    )


def missing_helpers() -> str | None:
    """Without this library Megatron calls make when training starts, and other ranks time out."""
    try:
        folder = Path(str(metadata.distribution("megatron-core").locate_file(HELPERS)))
    except metadata.PackageNotFoundError:
        return "megatron-core is not installed: run launch/container/install.sh packages"
    if any(folder.glob("helpers_cpp*.so")):
        return None
    return (
        f"megatron-core has no helpers_cpp*.so in {folder}: install its wheel for this Python "
        f"({platform.python_version()}), not an editable checkout"
    )


def _changed(name: str, old: dict[str, Any], new: dict[str, Any] | None) -> list[str]:
    cure = "a package was allowed to replace it; pin it, or install that package with --no-deps"
    if new is None:
        return [f"{name} {old['version']} of the base image is gone: {cure}"]
    if (new["version"], new["location"]) != (old["version"], old["location"]):
        was, now = (f"{d['version']} in {d['location']}" for d in (old, new))
        return [f"{name} of the base image was {was} and is {now}: {cure}"]
    if new["sha256"] != old["sha256"]:
        return [f"{name} {old['version']} of the base image has other files than before: {cure}"]
    return []


def _origin(module: str) -> str | None:
    spec = importlib.util.find_spec(module)
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or []), None)


def _files(distribution: metadata.Distribution) -> list[Path]:
    listed = distribution.files
    if listed is not None:
        return [Path(str(distribution.locate_file(entry))) for entry in listed]
    # Installed without a list, as setup.py develop does: the module's folder stands for it.
    origin = _origin(canonical(distribution.metadata["Name"]).replace("-", "_"))
    return [] if origin is None else [p for p in Path(origin).parent.rglob("*") if p.is_file()]


def _digest(files: Iterable[Path]) -> str:
    """By content, since layers and archives round times. Bytecode is derived and may come late."""
    whole = hashlib.sha256()
    for path in sorted(p for p in files if p.suffix != ".pyc"):
        whole.update(str(path).encode())
        if path.is_file():
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _record(file: Path) -> int:
    wrong = wrong_apex()
    if wrong:  # said before anything is downloaded
        return _report([wrong])
    now = snapshot()
    file.write_text(json.dumps(now, indent=1))
    whose = {"base": "the base image's own", "lock": "absent, uv.lock's will be installed"}
    print(f"Python {now['python']}; torch: {whose[now['torch_from']]}; protected from now on:")
    for name, entry in now["distributions"].items():
        print(f"  {name} {entry['version']} in {entry['location']}")
    return 0


def _verify(file: Path) -> int:
    before = json.loads(file.read_text())
    said = problems(before, snapshot())
    if not said:
        print(f"{len(before['distributions'])} protected distributions of the base are unchanged")
    return _report(said)


def _imports() -> int:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", _IMPORTS]).returncode


def _info(file: Path, *pairs: str) -> int:
    before = json.loads(file.read_text())
    installed = {canonical(d.metadata["Name"] or ""): d.version for d in metadata.distributions()}
    named = {pair.split("=", 1)[0]: pair.split("=", 1)[1] for pair in pairs}
    versions = {"python": platform.python_version()}
    versions |= {name: installed.get(name, "absent") for name in NAMED}
    print(json.dumps({**named, "torch_from": before["torch_from"], "versions": versions}, indent=1))
    return 0


def _report(said: list[str]) -> int:
    for problem in said:
        print(f"check_image: {problem}", file=sys.stderr)
    return 78 if said else 0


def main(words: list[str]) -> int:
    """Runs one subcommand; its exit code is 78 where the image must not be used."""
    commands: dict[str, Callable[..., int]] = {
        "record": _record,
        "verify": _verify,
        "imports": _imports,
        "info": _info,
    }
    if not words or words[0] not in commands or (words[0] != "imports" and len(words) < 2):
        print(__doc__, file=sys.stderr)
        return 78
    if words[0] == "imports":
        return _imports()
    return commands[words[0]](Path(words[1]), *words[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
