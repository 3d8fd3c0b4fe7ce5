"""What stands beside Megatron: Transformer Engine, Apex, the kernels of special layers.

Needs Megatron (and host mode, where there is no CUDA) to be importable already.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import torch
from packaging.specifiers import SpecifierSet

from moa_megatron import host

# The lower end has save_original_input, which fp8 needs here; the upper end is not yet there.
TE_VERSIONS = SpecifierSet(">=2.6,<3")
_LOCAL = "or use --transformer-impl local"
_INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]==2.17.*'"


def importable(name: str) -> bool:
    """Whether a module can be found; its own code is not run, that of its packages is."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a missing parent, or host mode hides it
        return False


def transformer_engine_problem() -> str | None:
    """Why Transformer Engine's modules cannot run here, with the cure; None where they can."""
    if host.active() or not torch.cuda.is_available():
        return f"it needs a CUDA device and this machine has none: start it on a GPU, {_LOCAL}"
    if not importable("transformer_engine"):
        return f"it is not installed: {_INSTALL}, {_LOCAL}"
    version = _version("transformer-engine")
    if not TE_VERSIONS.contains(version, prereleases=True):
        return f"version {version} is outside {TE_VERSIONS}: {_INSTALL}, {_LOCAL}"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a wrong torch or CUDA shows as OSError or RuntimeError as well
        return f"version {version} does not import ({error}): build it for this torch, {_LOCAL}"
    return None


def apex_problem() -> str | None:
    """The package index has another project of that name; Megatron takes either for NVIDIA's."""
    try:
        spec = importlib.util.find_spec("apex")
    except ValueError:  # hidden, or put there by hand
        return None
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if spec is None or any(Path(folder, "multi_tensor_apply").is_dir() for folder in folders):
        return None
    where = folders[0] if folders else spec.origin
    return (
        f"the package apex in {where} is not NVIDIA's Apex, but a web toolkit of the same name: "
        "pip uninstall apex (NVIDIA's comes with its PyTorch images; MoA runs without it too)"
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        import transformer_engine

        return str(getattr(transformer_engine, "__version__", "0"))
