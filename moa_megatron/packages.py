"""Which packages are installed, and which of them only look right; none of them is imported.

Standard library only: tools/doctor.py asks where torch is missing or broken.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

# The lower end has save_original_input, which fp8 needs here; the upper end is not yet there.
TE_FROM, TE_BELOW = (2, 6), (3, 0)
TE_VERSIONS = f">={TE_FROM[0]}.{TE_FROM[1]},<{TE_BELOW[0]}"
TE_INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]==2.17.*'"
_HELPERS = "megatron/core/datasets"


def importable(name: str) -> bool:
    """Whether a module can be found; its own code is not run, that of its packages is."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a missing parent, or host mode hides it
        return False


def version(distribution: str) -> str | None:
    """Version of an installed distribution; None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def engine_version_problem(found: str) -> str | None:
    """Why this version of Transformer Engine does not serve, with the cure."""
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and TE_FROM <= (int(numbers[1]), int(numbers[2])) < TE_BELOW:
        return None
    return f"version {found} is outside {TE_VERSIONS}: {TE_INSTALL}"


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


def helpers_problem() -> str | None:
    """Without this library Megatron calls make when training starts, and other ranks time out."""
    folder = Path(str(importlib.metadata.distribution("megatron-core").locate_file(_HELPERS)))
    if any(folder.glob("helpers_cpp*.so")):
        return None
    return (
        f"megatron-core has no helpers_cpp*.so in {folder}: install its wheel for this Python, "
        "not an editable checkout"
    )
