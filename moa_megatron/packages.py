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
# Modules of the extra `vision`, and the distributions that bring them.
VISION = {
    "nvidia.dali": "nvidia-dali-cuda130",
    "PIL": "pillow",
    "google.protobuf": "protobuf",
    "mlxtend": "mlxtend",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
}
VISION_INSTALL = "./launch/setup.sh vision (a container image: make image EXTRAS=vision)"
VISION_NEEDED = "this recipe needs the extra vision"
_DALI_NAMES = (VISION["nvidia.dali"], "nvidia-dali-cuda120")  # an image may have the older CUDA's
_DALI_FROM, _DALI_BELOW = 2, 3
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


def vision_problem() -> str | None:
    """Why recipes of images cannot run here, with the cure; None where they can."""
    missing = [name for module, name in VISION.items() if not importable(module)]
    if missing:
        return f"{VISION_NEEDED} ({', '.join(missing)}): {VISION_INSTALL}"
    return dali_version_problem(next(filter(None, map(version, _DALI_NAMES)), None))


def dali_version_problem(found: str | None) -> str | None:
    """Why this version of DALI does not serve, with the cure; None for one of unknown version."""
    if found is None or _DALI_FROM <= int(found.split(".")[0]) < _DALI_BELOW:
        return None
    return (
        f"DALI {found} is outside >={_DALI_FROM}.0,<{_DALI_BELOW}: {VISION_INSTALL}; in "
        "an image whose base brings it, take a base with another"
    )


def require_vision() -> None:
    """Makes sure that the packages of the extra ``vision`` are there; none is imported.

    Raises:
        RefusedError: one is missing, or DALI has another major version.
    """
    problem = vision_problem()
    if problem is not None:
        from moa_megatron.recipes import RefusedError  # needs PyYAML, which the doctor may lack

        raise RefusedError(problem)


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
